"""Proving a pass right where it changed something.

Both programs are walked in order, and equal values are given equal numbers. Where a pass replaced
a value, the two regions between the replaced value and the nearest values that both programs have
are run in float64 on the same random numbers. If they agree, the two values count as the same from
then on, and everything computed from them is the same by construction. Values that carry no
content (masks, positions, rotary tables, sizes) are not random: they are computed from valid
inputs, because rewrites rely on what they are.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.stages import Flow
from qcompile.ir.program import Program
from qcompile.passes.equivalence.cases import Case, cases
from qcompile.passes.equivalence.compare import difference, is_telling
from qcompile.passes.equivalence.evaluate import CannotRunError, Evaluator, Weights
from qcompile.passes.equivalence.numbering import Anatomy, Numbering, describe_value, freeze

_REACH = 4
"""How often a region is extended beyond the nearest shared values before its proof is given up."""

_MAX_FAILURES = 32
"""Different regions that may fail before the rest is left to a comparison of whole programs."""

_MAX_WEIGHT_BYTES = 1 << 29
"""Weights that may be held while regions are compared."""


@dataclass(frozen=True)
class LocalProof:
    """What a proof came to.

    Attributes:
        error: The largest relative difference of the regions that were run and agreed.
        unproved: The first result of the program after that was not shown to be the same, by
            name; None if the programs are the same.
        regions: How many regions were run.
        assumed: How many were not run, because of the size of their weights.
    """

    error: float
    unproved: str | None
    regions: int
    assumed: int


def prove_locally(
    before: Program,
    after: Program,
    *,
    tolerance: float,
    seed: int = 0,
    largest_weight: int | None = None,
) -> LocalProof:
    """Tries to show, region by region, that two programs compute the same.

    Regions of the same structure, as repeated layers have, are run for the first place and for
    one other, chosen at random.

    Args:
        before: The program before a pass.
        after: The program after it.
        tolerance: Relative difference in float64 up to which regions agree; 0 asks for equal bits.
        seed: For random numbers and choices.
        largest_weight: Regions that read weights of more elements are assumed to agree, for a
            caller that compares whole programs later; None runs all.

    Returns:
        A proof, which may be incomplete: a right pass can change values in between (a rotated
        residual stream) so that no region agrees by itself.
    """
    return _Proof(before, after, tolerance, seed, largest_weight).run()


@dataclass
class _Side:
    """One of the two programs, and what of it has been computed for each case."""

    flow: Flow
    anatomy: Anatomy
    evaluator: Evaluator
    static: list[dict[fx.Node, Any]]

    @classmethod
    def of(cls, program: Program, inputs: Sequence[Case], weights: Weights) -> _Side:
        flow = Flow(program)
        bound: list[dict[fx.Node, Any]] = [dict(case.bind(program)) for case in inputs]
        evaluator = Evaluator(program, flow.constant, weights)
        return cls(flow, Anatomy(program, flow), evaluator, bound)

    def value(self, root: fx.Node, given: Mapping[fx.Node, Any], case: int) -> Any:
        """The value of a node from those given, which stand for content, and a case's inputs."""
        env = dict(given)
        static = self.static[case]
        stack = [root]
        while stack:
            node = stack[-1]
            if node in env or node in static:
                stack.pop()
                continue
            operands = node.all_input_nodes
            missing = [n for n in operands if n not in env and n not in static]
            if missing:
                stack += missing
                continue
            scope = {n: env[n] if n in env else static[n] for n in operands}
            self.evaluator.run((node,), scope)
            kept = env if node in self.flow.dynamic or node in self.flow.constant else static
            kept[node] = scope[node]
            stack.pop()
        return env[root] if root in env else static[root]


@dataclass(frozen=True)
class _Region:
    """Two subgraphs that may compute the same from the same values.

    Attributes:
        before: The exit in the program before.
        after: The exit in the program after.
        entries: For each shared value at the border, the nodes that stand for it.
        structure: Equal for regions that differ in nothing but which weights they read.
        elements: Of the largest weight that they read.
    """

    before: fx.Node
    after: fx.Node
    entries: tuple[tuple[fx.Node, ...], ...]
    structure: Hashable
    elements: int


@dataclass
class _Verdict:
    """What is known of all regions of one structure."""

    holds: bool
    seen: int = 1
    sample: _Region | None = None


@dataclass
class _Proof:
    before: Program
    after: Program
    tolerance: float
    seed: int
    largest_weight: int | None
    error: float = 0.0
    regions: int = 0
    assumed: int = 0
    failures: int = 0
    verdicts: dict[Hashable, _Verdict] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)

    def __post_init__(self) -> None:
        self.cases = cases(self.before, self.seed)
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.numbers = Numbering(self.before, self.after)
        self.sides = [
            _Side.of(program, self.cases, self.weights) for program in (self.before, self.after)
        ]

    def run(self) -> LocalProof:
        if len(self.before.results) != len(self.after.results):
            return self._proof(self.after.results[0].name)
        self._number_all()
        unproved = next(
            (
                new.name
                for old, new in zip(self.before.results, self.after.results, strict=True)
                if not self._same(old, new)
            ),
            None,
        )
        if unproved is None:
            unproved = self._failing_sample()
        return self._proof(unproved)

    def _proof(self, unproved: str | None) -> LocalProof:
        return LocalProof(self.error, unproved, self.regions, self.assumed)

    def _number_all(self) -> None:
        old, new = self.sides
        twins: dict[str, fx.Node] = {}
        for node in old.flow.order:
            self.numbers.number_before(node)
            twins[node.name] = node
        for node in new.flow.order:
            if self.numbers.number_after(node):
                continue
            twin = twins.get(node.name)
            if twin is None or (twin.op, twin.target) != (node.op, node.target):
                continue
            pairs = self.numbers.argument_pairs(twin, node) if node.op == "call_function" else None
            if pairs is not None and all(self._same(a, b) for a, b in pairs):
                self.numbers.unite(twin, node)
            else:
                self._same(twin, node)

    def _same(self, old: fx.Node, new: fx.Node) -> bool:
        """Whether two values are the same; if this can be shown now, it is remembered."""
        if self.numbers.of(old) == self.numbers.of(new):
            return True
        if self.failures > _MAX_FAILURES or not _comparable(old, new):
            return False
        inner: set[int] = set()
        for _ in range(_REACH):
            region, border = self._region(old, new, inner)
            if self._holds(region):
                self.numbers.unite(old, new)
                return True
            if not border:
                break
            inner |= border
        return False

    def _holds(self, region: _Region) -> bool:
        verdict = self.verdicts.get(region.structure)
        if verdict is None:
            verdict = _Verdict(self._agrees(region))
            self.verdicts[region.structure] = verdict
            self.failures += not verdict.holds
            return verdict.holds
        verdict.seen += 1
        # Every further region is the sample with equal probability.
        if self.random.randrange(verdict.seen - 1) == 0:
            verdict.sample = region
        return verdict.holds

    def _failing_sample(self) -> str | None:
        for verdict in self.verdicts.values():
            if verdict.holds and verdict.sample is not None and not self._agrees(verdict.sample):
                return verdict.sample.after.name
        return None

    def _agrees(self, region: _Region) -> bool:
        if self.largest_weight is not None and region.elements > self.largest_weight:
            self.assumed += 1
            return True
        self.regions += 1
        try:
            errors = [self._error(region, case) for case in range(len(self.cases))]
        except CannotRunError:
            return False
        finally:
            if self.weights.live_bytes > _MAX_WEIGHT_BYTES:
                self.weights.release()
        if any(error is None or error > self.tolerance for error in errors):
            return False
        self.error = max([self.error, *(error for error in errors if error is not None)])
        return True

    def _error(self, region: _Region, number: int) -> float | None:
        """How far apart the exits are in a case; None if the numbers there tell nothing."""
        case = self.cases[number]
        given: dict[fx.Node, Any] = {}
        for nodes in region.entries:
            shape = case.sizes.shape(nodes[0].meta["val"])
            value = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            given |= dict.fromkeys(nodes, value)
        old, new = self.sides
        expected = old.value(region.before, given, number)
        found = new.value(region.after, given, number)
        if not is_telling(expected):
            return None
        return difference(case, region.before, expected, found)

    def _region(self, old: fx.Node, new: fx.Node, inner: set[int]) -> tuple[_Region, set[int]]:
        """The regions behind two values, cut at shared values that are not `inner`.

        Returns:
            The region, and the numbers of the values at its border.
        """
        entries: dict[int, list[fx.Node]] = {}
        places: dict[Hashable, int] = {}
        described: list[Hashable] = []
        elements = 0
        for side, root in zip(self.sides, (old, new), strict=True):
            seen: set[fx.Node] = set()
            stack = [root]
            local: dict[fx.Node, Hashable] = {}
            while stack:
                node = stack.pop()
                if node in local:
                    if node not in seen:
                        seen.add(node)
                        described.append(
                            (node.target, freeze((node.args, node.kwargs), local.__getitem__))
                        )
                    continue
                number = self.numbers.of(node)
                local[node] = places.setdefault((side is self.sides[0], number), len(places))
                if node not in side.flow.dynamic:
                    seen.add(node)
                    local[node] = places.setdefault(number, len(places))
                    described.append((local[node], side.anatomy.of(node)))
                    elements = max(elements, side.anatomy.elements(node))
                elif self._is_entry(node) and number not in inner:
                    seen.add(node)
                    entries.setdefault(number, []).append(node)
                    local[node] = places.setdefault(number, len(places))
                    described.append((local[node], describe_value(node)))
                else:
                    stack.append(node)
                    stack += [n for n in node.all_input_nodes if n not in local]
            described.append(("exit", local[root]))
        border = tuple(tuple(nodes) for nodes in entries.values())
        return _Region(old, new, border, tuple(described), elements), set(entries)

    def _is_entry(self, node: fx.Node) -> bool:
        """Whether random numbers may stand for a value."""
        value = node.meta.get("val")
        return (
            isinstance(value, Tensor)
            and value.dtype.is_floating_point
            and self.numbers.is_shared(node)
            and all(
                case.sizes.number(size) is not None for case in self.cases for size in value.shape
            )
        )


def _comparable(old: fx.Node, new: fx.Node) -> bool:
    one, other = old.meta.get("val"), new.meta.get("val")
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dim() == other.dim()
    return not isinstance(one, Tensor) and not isinstance(other, Tensor)
