"""One spelling for moving elements about."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult

aten = torch.ops.aten

_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)


class NormalizeMoves(Pass):
    """Spells permutations, parts and chains of reshapes one way.

    1. ``permute(x, axes)`` that swaps two axes, ``t(x)``       =>  ``transpose(x, a, b)``
    2. ``transpose(transpose(x, a, b), a, b)``                  =>  ``x``
    3. ``reshape(reshape(x))``, ``reshape(flatten(x))``         =>  ``reshape(x)``
    4. parts of ``split``, ``chunk`` with constant bounds       =>  ``slice(x, dim, start, end, 1)``
    5. slices scattered over all of a new tensor, in order      =>  ``cat(slices, dim)``
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Applies the rewrites in one sweep."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls():
            with editor.before(node):
                replacement = (
                    _transpose(editor, node)
                    or _reshape_once(editor, node)
                    or _part(editor, node)
                    or _assembled(editor, node)
                )
            if replacement is not None:
                editor.replace(node, replacement)
                result.rewrites += 1
        program.graph.eliminate_dead_code()
        return result


def _transpose(editor: Editor, node: fx.Node) -> fx.Node | None:
    axes = _swapped_axes(node)
    if axes is None:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is aten.transpose.int and _swapped_axes(source) == axes:
        return source.args[0]  # type: ignore[return-value]
    if node.target is aten.transpose.int:
        return None
    return editor.call(aten.transpose.int, source, *axes)


def _swapped_axes(node: fx.Node) -> tuple[int, int] | None:
    """The two axes that a node swaps, in order, if that is all it does."""
    if node.target is aten.t.default:
        return (0, 1) if len(node.meta["val"].shape) == 2 else None
    rank = len(getattr(node.meta["val"], "shape", ()))
    if node.target is aten.transpose.int:
        a, b = sorted(int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        return a, b
    if node.target is aten.permute.default:
        axes: Any = node.args[1]
        moved = [i for i, axis in enumerate(axes) if axis % rank != i]
        return (moved[0], moved[1]) if len(moved) == 2 else None
    return None


def _reshape_once(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.target is not aten.reshape.default:
        return None
    inner = node.args[0]
    if not isinstance(inner, fx.Node) or inner.target not in (
        aten.reshape.default,
        aten.flatten.using_ints,
    ):
        return None
    return editor.call(aten.reshape.default, inner.args[0], node.args[1])


def _part(editor: Editor, node: fx.Node) -> fx.Node | None:
    if node.target is not operator.getitem:
        return None
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in _SPLITS or len(split.kwargs):
        return None
    x: Any = split.args[0]
    dim: Any = split.args[2] if len(split.args) > 2 else 0
    sizes = [part.shape[dim] for part in split.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    start = sum(sizes[: int(index)])  # type: ignore[arg-type]
    return editor.call(aten.slice.Tensor, x, dim, start, start + sizes[int(index)], 1)  # type: ignore[arg-type]


def _assembled(editor: Editor, node: fx.Node) -> fx.Node | None:
    """What writing the parts of a new tensor one after the other has left."""
    parts: list[Any] = []
    base: Any = node
    axis: Any = None
    start: Any = None
    while isinstance(base, fx.Node) and base.target is aten.slice_scatter.default:
        args: tuple[Any, ...] = (*base.args, *(0, None, None, 1)[len(base.args) - 2 :])
        whole, part, dim, first, last, step = args
        size = whole.meta["val"].shape[dim]
        first, last = first or 0, size if last is None else last
        if step != 1 or not all(isinstance(bound, int) for bound in (size, first, last)):
            return None
        if min(last, size) != (size if start is None else start) or axis not in (None, dim):
            return None
        axis, start = dim, first
        parts.insert(0, part)
        base = whole
    if not parts or start != 0 or not _same_but_for(axis, parts, node):
        return None
    return editor.call(aten.cat.default, parts, axis)


def _same_but_for(axis: int, parts: list[fx.Node], whole: fx.Node) -> bool:
    """Whether parts have the shape of the whole on all other axes."""
    skipped = axis % whole.meta["val"].dim()

    def others(node: fx.Node) -> list[str]:
        return [str(size) for i, size in enumerate(node.meta["val"].shape) if i != skipped]

    return all(others(part) == others(whole) for part in parts)
