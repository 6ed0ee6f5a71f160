"""One spelling for moving elements about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.edit import Editor
from qcompile.passes.infra import Exact
from qcompile.passes.rule import ANY, ApplyRules, Const, Match, Named, OneOf, Rule, Shared

aten = torch.ops.aten


class NormalizeMoves(ApplyRules):
    """Spells permutations, parts and chains of reshapes one way; see the rules below."""

    numerics = Exact()

    def __init__(self) -> None:
        super().__init__(
            (SwapToTranspose(), UndoTranspose(), ReshapeOnce(), PartToSlice()),
            report_misses=False,
        )


class SwapToTranspose(Rule):
    """``permute(x, axes)`` that swaps two axes, ``t(x)``  =>  ``transpose(x, a, b)``."""

    def pattern(self, x: Tensor) -> Any:
        """Either spelling."""
        return OneOf(aten.t.default(x), aten.permute.default(x, ANY()))

    def check(self, match: Match) -> str | None:
        """Exactly two axes must change places."""
        return "no two axes are swapped" if _swapped_axes(match.outputs[0]) is None else None

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The swap, its axes in order."""
        axes = _swapped_axes(match.outputs[0])
        assert axes is not None
        return edit.call(aten.transpose.int, match["x"], *axes)


class UndoTranspose(Rule):
    """``transpose(transpose(x, a, b), a, b)``  =>  ``x``."""

    def pattern(self, x: Tensor) -> Any:
        """Two swaps; others may read what stands between them."""
        inner = Named("inner", Shared(aten.transpose.int(x, ANY(), ANY())))
        return aten.transpose.int(inner, ANY(), ANY())

    def check(self, match: Match) -> str | None:
        """Both must swap the same axes."""
        same = _swapped_axes(match.node("inner")) == _swapped_axes(match.outputs[0])
        return None if same else "other axes are swapped"

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """What was there before."""
        del edit
        return match.node("x")


class ReshapeOnce(Rule):
    """``reshape(reshape(x))``, ``reshape(flatten(x))``  =>  ``reshape(x)``."""

    def pattern(self, x: Tensor) -> Any:
        """Two reshapes; others may read what stands between them."""
        inner = OneOf(
            aten.reshape.default(x, ANY()), aten.flatten.using_ints(x, ANY("first"), ANY("last"))
        )
        return aten.reshape.default(Shared(inner), ANY("shape"))

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The last shape alone."""
        return edit.call(aten.reshape.default, match["x"], match["shape"])


class PartToSlice(Rule):
    """Parts of ``split``, ``chunk`` with constant bounds  =>  ``slice(x, dim, start, end, 1)``."""

    def pattern(self, x: Tensor, dim: Const, index: Const) -> Any:
        """One of the parts."""
        parts = OneOf(
            aten.split_with_sizes.default(x, ANY(), dim),
            aten.split.Tensor(x, ANY(), dim),
            aten.chunk.default(x, ANY(), dim),
        )
        return Named("parts", Shared(parts))[index]

    def check(self, match: Match) -> str | None:
        """The sizes of the parts must be numbers."""
        known = all(isinstance(size, int) for size in _part_sizes(match))
        return None if known else "the size of a part is symbolic"

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The part by its bounds."""
        sizes, index = _part_sizes(match), match["index"]
        start = sum(sizes[:index])
        return edit.call(
            aten.slice.Tensor, match["x"], match["dim"], start, start + sizes[index], 1
        )


def _swapped_axes(node: fx.Node) -> tuple[int, int] | None:
    """The two axes that a node swaps, in order, if that is all it does."""
    rank = node.meta["val"].dim()
    if node.target is aten.t.default:
        return (0, 1) if rank == 2 else None
    if node.target is aten.transpose.int:
        a, b = sorted(int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        return a, b
    axes: Any = node.args[1]
    moved = [i for i, axis in enumerate(axes) if axis % rank != i]
    return (moved[0], moved[1]) if len(moved) == 2 else None


def _part_sizes(match: Match) -> list[Any]:
    return [part.shape[match["dim"]] for part in match.node("parts").meta["val"]]
