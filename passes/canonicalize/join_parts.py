"""Tensors that are written part by part become concatenations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult

aten = torch.ops.aten


class JoinParts(Pass):
    """Slices scattered over all of a new tensor, in order  =>  ``cat(slices, dim)``.

    No rule, because there may be any number of slices.
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Joins whatever covers its tensor."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(aten.slice_scatter.default):
            with editor.before(node):
                joined = _assembled(editor, node)
            if joined is not None:
                editor.replace(node, joined)
                result.rewrites += 1
        return result


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
