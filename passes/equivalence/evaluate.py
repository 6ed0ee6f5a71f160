"""Running nodes in float64, with weights that are materialized once, shared and freed."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import EquivalenceError
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.weights import Apply, Expression, Source

aten = torch.ops.aten

DTYPE = torch.float64

KEPT_BYTES = 256 << 20
"""What is larger is read again where it is used again: an embedding table that is the projection
to the vocabulary as well would otherwise be held, in float64, while all layers run."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Product:
    """A product with a weight that has been computed."""

    x: Tensor
    bias: Tensor | None
    y: Tensor


class Weights:
    """Weights in float64, unrounded, held until released and shared where they are the same.

    Attributes:
        live_bytes: What is held now.
        peak_bytes: The most that was held at a time.
    """

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self._held: dict[Hashable, Any] = {}
        self._products: dict[int, list[_Product]] = {}

    def read(self, program: Program, name: str) -> Tensor:
        """An entry of a program's weight store."""
        key = weight_key(program, name)
        if key not in self._held:
            self.hold(key, program.weights.materialize(name, DTYPE))
        value: Tensor = self._held[key]
        return value

    def hold(self, key: Hashable, value: Any) -> None:
        """Holds a value that was computed from weights."""
        self._held[key] = value
        self.live_bytes += _bytes(value)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def get(self, key: Hashable) -> Any:
        """A value that is held, or None."""
        return self._held.get(key)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x W^T + b`` with a weight that is held.

        Most products are the same in both programs, down to the last bit of their operands: those
        are computed once.
        """
        known = self._products.setdefault(id(weight), [])
        for product in known:
            if product.bias is bias and torch.equal(product.x, x):
                return product.y
        y: Tensor = aten.linear.default(x, weight, bias)
        known.append(_Product(x, bias, y))
        return y

    def release(self, keep: Container[Hashable] = ()) -> None:
        """Lets go of everything but what has the given keys and is not large."""
        self._products = {}
        self._held = {
            key: value
            for key, value in self._held.items()
            if key in keep and _bytes(value) <= KEPT_BYTES
        }
        self.live_bytes = sum(map(_bytes, self._held.values()))


def weight_key(program: Program, name: str) -> Hashable:
    """Equal for entries that hold the same numbers by construction, whatever their names."""
    return _expression_key(program.weights.expression(name)), program.weights.spec(name)


def held_key(program: Program, node: fx.Node) -> Hashable:
    """Under what `Weights` holds the value of a weight, or of a call that reads weights only."""
    if node.op == "get_attr":
        return weight_key(program, str(node.target))
    return id(program), node


def _expression_key(expression: Expression) -> Hashable:
    match expression:
        case Source(checkpoint=checkpoint, name=name):
            return (id(checkpoint), name)
        case Apply(function=function, operands=operands):
            return (id(function), *map(_expression_key, operands))
    return id(expression)


def _bytes(value: Any) -> int:
    return value.element_size() * value.nelement() if isinstance(value, Tensor) else 0


class CannotRunError(EquivalenceError):
    """A node of a program does not run."""


class Evaluator:
    """Computes values of a program's nodes on demand.

    Args:
        program: The program.
        constant: Its nodes that depend on weights alone.
        weights: Where weights are held.
    """

    def __init__(self, program: Program, constant: set[fx.Node], weights: Weights) -> None:
        self.program = program
        self._constant = constant
        self._weights = weights

    @torch.no_grad()
    def run(self, nodes: Iterable[fx.Node], env: MutableMapping[fx.Node, Any]) -> None:
        """Adds the values of nodes, given in an order in which they can run, to `env`.

        What depends on weights alone is held with the weights.

        Raises:
            CannotRunError: Names the node.
        """
        for node in nodes:
            if node in env:
                continue
            if node.op == "get_attr":
                env[node] = self._weights.read(self.program, str(node.target))
            elif node in self._constant:
                key = held_key(self.program, node)
                if self._weights.get(key) is None:
                    self._weights.hold(key, _call(node, env))
                env[node] = self._weights.get(key)
            elif node.target is aten.linear.default and node.args[1] in self._constant:
                env[node] = _call(node, env, self._weights.linear)
            else:
                env[node] = _call(node, env)


def _call(
    node: fx.Node, env: Mapping[fx.Node, Any], function: Callable[..., Any] | None = None
) -> Any:
    """The value of a call, in float64 where the program has float32.

    Args:
        node: The call.
        env: The values of its operands.
        function: What to call in place of its operator.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if value is torch.float32:
            return DTYPE
        return _CPU if isinstance(value, torch.device) else value

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), fill)
    try:
        value = (function or node.target)(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CannotRunError(
            f"node '{node.name}' ({format_target(node.target)}) cannot run: {reason[0]}"
        ) from error
    # Operators that make numbers (from codes, for instance) make float32.
    is_single = isinstance(value, Tensor) and value.dtype == torch.float32
    return value.to(DTYPE) if is_single else value
