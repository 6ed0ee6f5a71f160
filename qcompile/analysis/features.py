"""Feature axes of values: what the declarations of operators speak of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from qcompile.analysis.axes import ALL_FAMILIES, Axes
from qcompile.analysis.families import Family, PortRole
from qcompile.ir.text import format_target

P, D, R, S = Family.PERMUTATION, Family.DIAGONAL, Family.ORTHOGONAL, Family.SHIFT

Dims = tuple[int, ...]
"""Dimensions of a value that together make one feature axis, outermost first."""


@dataclass(frozen=True)
class Norm:
    """A normalization whose gain must be folded before its basis can be rotated.

    Attributes:
        node: The call.
        axis: The feature axis of its input.
        centred: Whether it subtracts the mean, so that its producers must be centred first.
    """

    node: fx.Node
    axis: int
    centred: bool


@dataclass
class BasisMap:
    """The feature axes of every value in a program.

    Attributes:
        axes: Axes, links, ports and blockers.
        features: For each value its feature axes by their dimensions.
        norms: The normalizations met.
    """

    axes: Axes = field(default_factory=Axes)
    features: dict[fx.Node, dict[Dims, int]] = field(default_factory=dict)
    norms: list[Norm] = field(default_factory=list)

    def of(self, node: fx.Node, dims: Dims) -> int:
        """The feature axis on some dimensions; unknown where it comes from, it may not change."""
        known = self.features.setdefault(node, {})
        if dims not in known:
            known[dims] = self.axes.new(size_of(node, dims))
            self.axes.block(known[dims], node.name, origin_of(node))
        return known[dims]

    def give(self, node: fx.Node, dims: Dims, axis: int) -> None:
        """Says that a value has a feature axis on some dimensions."""
        self.features.setdefault(node, {})[dims] = axis

    def fresh(self, node: fx.Node, dims: Dims) -> int:
        """A new feature axis on some dimensions of a value."""
        axis = self.axes.new(size_of(node, dims))
        self.give(node, dims, axis)
        return axis

    def port(
        self,
        axis: int,
        weight: fx.Node,
        weight_axis: int,
        role: PortRole,
        families: Iterable[Family] = ALL_FAMILIES,
        *,
        weight_start: int = 0,
    ) -> None:
        """Puts a weight's axis, or a stretch of it, on a feature axis."""
        size = size_of(weight, (weight_axis,))
        name = str(weight.target)
        self.axes.port(axis, name, weight_axis, size, role, families, weight_start=weight_start)

    def block_all(self, node: fx.Node, reason: str) -> None:
        """Blocks every feature axis of a value."""
        for axis in self.features.get(node, {}).values():
            self.axes.block(axis, node.name, reason)


Declaration = Callable[[BasisMap, fx.Node], Iterable[fx.Node]]
"""Declares one call and returns the operands whose axes it has dealt with."""


def pass_on(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """The result has the axes of its only tensor operand, dimension by dimension."""
    x = operand_of(node, 0)
    for dims, axis in bases.features.get(x, {}).items():
        bases.give(node, dims, axis)
    return [x]


def dimension(value: Any, rank: int) -> int:
    """A dimension as an operator is given it, counted from the front."""
    return int(value) % rank


def dimensions(values: Any, rank: int) -> list[int]:
    """Several of them, in their order."""
    return [dimension(value, rank) for value in values]


def move(bases: BasisMap, node: fx.Node, x: fx.Node, where: Callable[[int], int]) -> list[fx.Node]:
    """The result has the axes of `x`, on dimensions that `where` maps the old ones to."""
    for dims, axis in list(bases.features.get(x, {}).items()):
        bases.give(node, tuple(where(d) for d in dims), axis)
    return [x]


def aligned(bases: BasisMap, a: fx.Node, b: fx.Node) -> tuple[tuple[Dims, Dims], Dims] | None:
    """The feature dimensions that two operands of an elementwise operator share."""
    rank = max(rank_of(a), rank_of(b))
    dims_a, dims_b = single_feature(bases, a), single_feature(bases, b)
    lifted = {
        tuple(d + rank - rank_of(x) for d in dims)
        for x, dims in ((a, dims_a), (b, dims_b))
        if dims is not None
    }
    if len(lifted) != 1:
        return None
    (dims,) = lifted
    here = [tuple(d - rank + rank_of(x) for d in dims) for x in (a, b)]
    if any(min(d, default=-1) < 0 for d in here):
        return None
    if size_of(a, here[0]) != size_of(b, here[1]):
        return None
    return (here[0], here[1]), dims


def single_feature(bases: BasisMap, node: fx.Node) -> Dims | None:
    """The dimensions of a value's feature axis, if it has exactly one."""
    known = bases.features.get(node, {})
    return next(iter(known)) if len(known) == 1 else None


def operand_of(node: fx.Node, position: int) -> fx.Node:
    """An argument that must be a node."""
    value = node.args[position]
    assert isinstance(value, fx.Node)
    return value


def rank_of(node: fx.Node) -> int:
    """Number of dimensions of a value."""
    return len(node.meta["val"].shape)


def size_of(node: fx.Node, dims: Dims) -> int:
    """The size of an axis; -1 if a dimension of it is symbolic."""
    product = 1
    for d in dims:
        size = node.meta["val"].shape[d]
        if not isinstance(size, int):
            return -1
        product *= size
    return product


def elements_of(node: fx.Node) -> int:
    """Number of elements of a value; -1 if that depends on a symbolic size."""
    return size_of(node, tuple(range(rank_of(node))))


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size and no tensor."""
    value = node.meta.get("val")
    return not isinstance(value, (Tensor, list, tuple))


def origin_of(node: fx.Node) -> str:
    """Why a value of unknown making may not change."""
    if node.op == "placeholder":
        return f"it is the input '{node.target}'"
    return (
        f"it comes from {format_target(node.target)}" if node.op == "call_function" else "a weight"
    )
