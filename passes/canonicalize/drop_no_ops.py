"""Removes operators that compute nothing: assertions, aliases, casts and views to what is there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult

aten = torch.ops.aten

ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)

ALIASES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
    }
)
"""Their result is their first argument (dropout: programs are captured in evaluation mode)."""

CASTS = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten.to.other,
        aten._to_copy.default,
        aten.type_as.default,
    }
)

RESHAPES = frozenset({aten.reshape.default, aten.expand.default})

VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})

NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
"""The literal that changes nothing as the second operand."""


class DropNoOps(Pass):
    """Drops what computes nothing and strips devices.

    1. assertions                                    =>  removed
    2. alias, clone, contiguous, detach, dropout     =>  their operand
    3. cast to the dtype that is there               =>  its operand; others => ``aten.to.dtype``
    4. view, reshape, expand to the shape that is there, full slices => their operand
    5. ``cat`` of one tensor, or with empty tensors  =>  without them
    6. ``device=``, ``layout=``, ``pin_memory=``     =>  removed: a program has no device
    7. ``view``                                      =>  ``reshape``: a program has no strides
    8. ``copy(to, from)`` of one shape and dtype     =>  ``from``
    9. ``x * 1``, ``x / 1``, ``x + 0``, ``x - 0``    =>  ``x``
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Removes what it can in one sweep over the graph."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls():
            if node.target in ASSERTIONS:
                program.graph.erase_node(node)
                result.rewrites += 1
            elif (replacement := _replacement(editor, node)) is not None:
                editor.replace(node, replacement)
                result.rewrites += 1
            else:
                result.rewrites += _strip_placement(node)
        return result


def _replacement(editor: Editor, node: fx.Node) -> fx.Node | None:
    target, args = node.target, node.args
    if target in ALIASES:
        return _node(args[0])
    if target in CASTS:
        return _cast(editor, node)
    if target in VIEWS:
        return _reshape(editor, node)
    if target is aten.copy.default:
        return _node(args[1]) if _same_spec(args[1], node) else None
    if target in RESHAPES:
        return _node(args[0]) if _same_shape(args[0], node) else None
    if target in NEUTRAL:
        neutral = args[1] == NEUTRAL[target] and not node.kwargs and _same_spec(args[0], node)
        return _node(args[0]) if neutral else None
    if target is aten.slice.Tensor:
        return _node(args[0]) if _is_full_slice(node) else None
    if target is aten.cat.default:
        return _cat(editor, node)
    if target is operator.getitem and isinstance(args[0], (tuple, list)):
        return _node(args[0][args[1]])  # type: ignore[index]
    return None


def _reshape(editor: Editor, node: fx.Node) -> fx.Node:
    """A view with strides gone: what was contiguous when traced need not be any more."""
    if _same_shape(node.args[0], node):
        return _node(node.args[0])
    with editor.before(node):
        new = editor.graph.call_function(aten.reshape.default, node.args, node.kwargs)
    new.meta["val"] = node.meta["val"]
    return new


def _cast(editor: Editor, node: fx.Node) -> fx.Node | None:
    source = _node(node.args[0])
    if source.meta["val"].dtype == node.meta["val"].dtype:
        return source
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return None
    with editor.before(node):
        return editor.call(aten.to.dtype, source, node.meta["val"].dtype)


def _cat(editor: Editor, node: fx.Node) -> fx.Node | None:
    operands = list(node.args[0])  # type: ignore[arg-type]
    kept = [operand for operand in operands if not _is_empty(operand)] or operands[:1]
    if len(kept) == 1:
        return _node(kept[0])
    if len(kept) == len(operands):
        return None
    with editor.before(node):
        return editor.call(aten.cat.default, kept, *node.args[1:], **node.kwargs)


def _strip_placement(node: fx.Node) -> int:
    placement = [key for key in ("device", "layout", "pin_memory") if key in node.kwargs]
    if placement:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in placement}
    return len(placement)


def _is_empty(operand: Any) -> bool:
    shape = operand.meta["val"].shape
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0


def _is_full_slice(node: fx.Node) -> bool:
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given: tuple[Any, ...] = node.args
    _, dim, start, end, step = (*given, *defaults[len(given) - 1 :])
    if start not in (0, None) or step != 1:
        return False
    if end is None or (isinstance(end, int) and end >= 2**62):
        return True
    size = _node(node.args[0]).meta["val"].shape[dim]
    if isinstance(end, fx.Node):
        return _same_size(end.meta["val"], size)
    return isinstance(size, int) and isinstance(end, int) and end >= size


def _same_spec(source: Any, node: fx.Node) -> bool:
    if not isinstance(source, fx.Node):
        return False
    return _same_shape(source, node) and source.meta["val"].dtype == node.meta["val"].dtype


def _same_shape(source: Any, node: fx.Node) -> bool:
    before, after = _node(source).meta["val"].shape, node.meta["val"].shape
    return len(before) == len(after) and all(map(_same_size, before, after))


def _same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for all values of the symbols."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    assert isinstance(value.meta["val"], (Tensor, torch.SymInt, int))
    return value
