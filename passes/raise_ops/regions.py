"""Single-entry regions of a graph, and running them on chosen numbers.

Raising asks of a region not how it is spelled but what it computes: it finds the value that the
region depends on, runs the region in float64 on random numbers, and compares with the operator
that it might be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.size_numbers import filling_sizes

TOLERANCE = 1e-10
"""Relative error in float64 up to which a region counts as the operator it was compared with."""

REASON = "barrier"
"""Key in ``node.meta`` under which a pass leaves the reason why it did not raise a node."""

_SIZES = (3, 5, 7, 11, 13, 17)
"""Values given to symbolic sizes in order: different, so that a mix-up of axes shows."""

_MAX_PROBED_WEIGHT = 1 << 20
"""Weights with more elements are never read for a probe: regions hold gains, not matrices."""


class NotClosedError(Exception):
    """A region needs a value that was not given."""


class Probe:
    """Runs parts of a program in float64.

    Args:
        program: The program; not changed.
        seed: For the random inputs.
    """

    def __init__(self, program: Program, seed: int = 0) -> None:
        self.program = program
        self._generator = torch.Generator().manual_seed(seed)
        self._sizes = filling_sizes(program)
        self._weights: dict[str, Tensor] = {}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node, with numbers for the symbols."""
        return tuple(self.size(size) for size in node.meta["val"].shape)

    def size(self, size: int | torch.SymInt) -> int:
        """A size, with numbers for the symbols."""
        if isinstance(size, int):
            return size
        return self._evaluate(size, self._sizes)

    def _evaluate(self, size: torch.SymInt, known: Mapping[sympy.Symbol, int]) -> int:
        """A size under an assignment; symbols that no input has (counts of tokens) get one too."""
        for symbol in size.node.expr.free_symbols - known.keys():
            self._sizes.setdefault(symbol, _SIZES[len(self._sizes) % len(_SIZES)])
        return int(size.node.expr.subs({**self._sizes, **known}))

    def random(self, node: fx.Node, scale: float = 1.0) -> Tensor:
        """Random float64 numbers in the shape of a node."""
        shape = self.shape(node)
        return scale * torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def run(self, output: fx.Node, given: Mapping[fx.Node, Any]) -> Any:
        """The value of `output` when the `given` nodes have the given values.

        Raises:
            NotClosedError: If it depends on an input of the program that is not given, or cannot
                be run on these values.
        """
        values: dict[fx.Node, Any] = dict(given)
        sizes = self._sizes | _observed_sizes(given)
        with _default_float64():
            for node in _backward(output, stop=set(given)):
                values[node] = self._value(node, values, sizes)
        return values[output]

    def _value(
        self, node: fx.Node, values: Mapping[fx.Node, Any], sizes: Mapping[sympy.Symbol, int]
    ) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return self._evaluate(value, sizes)
        if isinstance(value, int):
            return value
        if node.op == "get_attr":
            return self._weight(str(node.target))
        if node.op != "call_function":
            raise NotClosedError(node.name)
        call: Any = node.target
        filled = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        args, kwargs = fx.node.map_aggregate(
            filled, lambda v: torch.float64 if v is torch.float32 else v
        )
        try:
            return call(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError) as error:
            # Sizes that depend on data are numbers here, and need not fit the data.
            raise NotClosedError(node.name) from error

    def _weight(self, name: str) -> Tensor:
        if self.program.weights.spec(name).elements > _MAX_PROBED_WEIGHT:
            raise NotClosedError(name)
        if name not in self._weights:
            self._weights[name] = self.program.weights.materialize(name, torch.float64)
        return self._weights[name]


@contextmanager
def _default_float64() -> Iterator[None]:
    """What is made from integers inside is float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Max |difference| over max |expected|; infinite if shapes differ or a number is not finite."""
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / max(scale, 1e-30)


def data_nodes(program: Program) -> set[fx.Node]:
    """Nodes that depend on the tokens' content, as opposed to positions and masks.

    Content enters through embeddings of the token ids and through floating inputs.
    """
    aten = torch.ops.aten
    data: set[fx.Node] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            is_source = isinstance(value, Tensor) and value.dtype.is_floating_point
        else:
            is_source = node.target is aten.embedding.default and _reads_ids(node)
        is_size = not isinstance(value, (Tensor, list, tuple))
        if is_source or (not is_size and any(n in data for n in node.all_input_nodes)):
            data.add(node)
    return data


def dominators(node: fx.Node, within: set[fx.Node], limit: int = 40) -> list[fx.Node]:
    """Nodes through which every path to `node` passes, nearest first.

    Args:
        node: The exit of a region.
        within: Only these nodes count as paths (data, for instance).
        limit: How many nodes back to look.
    """
    frontier = {n for n in node.all_input_nodes if n in within}
    found: list[fx.Node] = []
    for _ in range(limit):
        if not frontier:
            break
        if len(frontier) == 1:
            (only,) = frontier
            if isinstance(only.meta["val"], Tensor):
                found.append(only)
            frontier = {n for n in only.all_input_nodes if n in within}
        else:
            latest = _latest(frontier)
            frontier.remove(latest)
            frontier |= {n for n in latest.all_input_nodes if n in within}
    return found


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for all values of the symbols."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(sympy.expand(a.node.expr - b.node.expr) == 0)
    return isinstance(a, int) and isinstance(b, int) and a == b


def snap(value: float, region: Iterable[fx.Node]) -> float:
    """A fitted number, replaced by the literal of the region that it reproduces, if any."""
    for node in region:
        for literal in (*node.args, *node.kwargs.values()):
            if isinstance(literal, float) and abs(literal - value) <= 1e-6 * abs(literal):
                return literal
    return value


def _latest(nodes: set[fx.Node]) -> fx.Node:
    """The last of some nodes in graph order."""
    return max(nodes)


def _reads_ids(node: fx.Node) -> bool:
    """Whether an embedding looks up token ids (an input), rather than computed positions."""
    ids = node.args[1]
    return (
        isinstance(ids, fx.Node) and ids.op == "placeholder" and "position" not in str(ids.target)
    )


def _backward(output: fx.Node, stop: set[fx.Node]) -> list[fx.Node]:
    """Everything that `output` needs beyond `stop`, in graph order."""
    needed: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node not in needed and node not in stop:
            needed.add(node)
            if not isinstance(node.meta["val"], (int, torch.SymInt)):  # a size is known as it is
                pending.extend(node.all_input_nodes)
    return sorted(needed)


def _observed_sizes(given: Mapping[fx.Node, Any]) -> dict[sympy.Symbol, int]:
    """The symbols whose numbers show in the shapes of given inputs."""
    found: dict[sympy.Symbol, int] = {}
    for node, tensor in given.items():
        if node.op == "placeholder" and isinstance(tensor, Tensor):
            for size, number in zip(node.meta["val"].shape, tensor.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    found[size.node.expr] = number
    return found
