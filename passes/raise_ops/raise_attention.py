"""Attention, recognized where a model spells it out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.raise_ops.regions import (
    REASON,
    TOLERANCE,
    NotClosedError,
    Probe,
    relative_error,
    same_size,
)

aten = torch.ops.aten

_DEPTH = 16
"""How many operators may stand between the product of queries and keys and its softmax."""

_SILENT = -1e4
"""A score as low as this gets no weight: what models fill in where attention is forbidden."""

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_JOINS = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
"""Operators that join batch and heads, or split them."""

_MAXIMUM = (aten.maximum.default, aten.max.other)


class RaiseAttention(Pass):
    """Makes each attention one operator.

    1. ``scaled_dot_product_attention(q, k, v, ...)`` of ATen  =>  ``qc.attention(q, k, v, ...)``
    2. ``matmul(softmax(f(matmul(q, transpose(k)))), v)`` where `f` scales, caps and masks
       =>  ``qc.attention(q, k, v, mask, scale, softcap)``
    3. keys and values repeated for each query head  =>  as they were

    What `f` does is read from the graph and then checked: old and new are run on random numbers.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Raises what probing accepts; the rest stays, with its reason."""
        result = PassResult()
        editor = Editor(program)
        probe = Probe(program, context.seed)
        for node in program.calls(aten.scaled_dot_product_attention.default):
            reason = _raise_native(editor, node)
            _record(result, node, reason)
        for node in program.calls(*_SOFTMAX):
            product = _weighted_sum(node)
            if product is not None:
                _record(result, node, _raise_spelled(editor, probe, node, product))
        for node in program.calls(dialect.attention):
            result.rewrites += _without_repeats(node)
        return result


def _record(result: PassResult, node: fx.Node, reason: str | None) -> None:
    if reason is None:
        result.rewrites += 1
    else:
        node.meta[REASON] = reason  # `Settle` reports it


def _raise_native(editor: Editor, node: fx.Node) -> str | None:
    """Replaces ATen's operator; returns a reason if that cannot be done."""
    defaults: tuple[Any, ...] = (None, 0.0, False)
    arguments: tuple[Any, ...] = node.args
    query, key, value, *rest = arguments
    mask, dropout, causal = (*rest, *defaults[len(rest) :])
    shapes = [_shape(operand) for operand in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        return "attention over tensors that have no axis of heads"
    if dropout:
        return "attention with dropout"
    if causal and not same_size(shapes[0][2], shapes[1][2]):
        # ATen aligns the first query with the first key, we the last with the last.
        return "causal attention with fewer queries than keys"
    scale = node.kwargs.get("scale")
    scale = shapes[0][3] ** -0.5 if scale is None else scale
    if not isinstance(scale, (int, float)):
        return "attention with a scale that is no constant"
    with editor.before(node):
        arguments = (query, key, value, mask, None, None, float(scale), bool(causal), 0, 0.0)
        editor.replace(node, editor.call(dialect.attention, *arguments))
    return None


def _weighted_sum(softmax: fx.Node) -> fx.Node | None:
    """The product of the softmax with the values, if its weights are used for nothing else."""
    node = softmax
    rank = len(_shape(softmax))
    if rank not in (3, 4) or softmax.args[1] not in (-1, rank - 1):
        return None
    while len(users := _tensor_users(node)) == 1:
        (user,) = users
        if user.target is aten.matmul.default:
            return user if user.args[0] is node else None
        if user.target not in (*_JOINS, aten.nan_to_num.default):
            return None
        node = user
    return None


def _tensor_users(node: fx.Node) -> list[fx.Node]:
    """Users, but for those that only ask for a size."""
    return [user for user in node.users if not isinstance(user.meta.get("val"), torch.SymInt)]


@dataclass(frozen=True)
class _Scale:
    factor: float


@dataclass(frozen=True)
class _Add:
    term: fx.Node


@dataclass(frozen=True)
class _Allow:
    """Scores stay where `condition` is true, or false if `inverted`."""

    condition: fx.Node
    inverted: bool


@dataclass(frozen=True)
class _Tanh:
    pass


_Step = _Scale | _Add | _Allow | _Tanh


def _raise_spelled(editor: Editor, probe: Probe, softmax: fx.Node, product: fx.Node) -> str | None:
    found = _walk(probe, softmax.args[0], _DEPTH)
    if found is None:
        return "a softmax that is not over a product of queries and keys"
    scores, steps = found
    query, value = _heads(scores.args[0]), _heads(product.args[1])
    key = _keys(scores.args[1])
    if query is None or key is None or value is None:
        return "attention over tensors that have no axis of heads"
    with editor.before(product):
        masking = _replay(editor, steps, int(query.meta["val"].shape[1]))
        if masking is None:
            return "attention that caps its scores after masking them"
        keys = key.source
        if key.axes != (0, 1, 2, 3):
            keys = editor.call(aten.permute.default, keys, list(key.axes))
        new = editor.call(
            dialect.attention,
            *(query, keys, value, masking.mask, None, None),
            *(masking.scale, False, 0, masking.softcap),
        )
        joined = new
        if len(_shape(product)) == 3:
            joined = editor.call(aten.flatten.using_ints, new, 0, 1)
    if not _agrees(probe, (query, key.source, value), steps, product, joined):
        _erase_unused(editor.graph, joined)
        return "attention of which a probe says that it is something else"
    editor.replace(product, joined)
    return None


def _walk(probe: Probe, node: Any, depth: int) -> tuple[fx.Node, list[_Step]] | None:
    """From scores back to the product that they come from, and what happens on the way."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or depth == 0:
        return None
    if node.target is aten.matmul.default:
        return node, []
    for source, step in _undo(probe, node):
        found = _walk(probe, source, depth - 1)
        if found is not None:
            return found[0], [*found[1], *([step] if step else [])]
    return None


def _undo(probe: Probe, node: fx.Node) -> list[tuple[Any, _Step | None]]:
    """What a node may have been applied to, and what it does to that."""
    args, target = node.args, node.target
    if target in _JOINS:
        return [(args[0], None)]
    if target is aten.tanh.default:
        return [(args[0], _Tanh())]
    if target in (aten.mul.Tensor, aten.div.Tensor) and not node.kwargs:
        options: list[tuple[Any, _Step | None]] = []
        for source, other in (args, args[::-1]):
            factor = _number(probe, other)
            if factor is not None and (target is aten.mul.Tensor or source is args[0]):
                step = _Scale(factor if target is aten.mul.Tensor else 1 / factor)
                options.append((source, step))
        return options
    if target is aten.add.Tensor and not node.kwargs:
        return [
            (source, _Add(other))
            for source, other in (args, args[::-1])
            if isinstance(source, fx.Node) and isinstance(other, fx.Node)
        ]
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and _silences(probe, args[2]):
        return [(args[0], _Allow(_node(args[1]), inverted=True))]
    if target in (aten.where.self, aten.where.ScalarOther) and _silences(probe, args[2]):
        return [(args[1], _Allow(_node(args[0]), inverted=False))]
    if target in _MAXIMUM:
        return [(a, None) for a, b in (args, args[::-1]) if _silences(probe, b)]
    return []


@dataclass(frozen=True)
class _Masking:
    """Scale, cap and mask, in the order of `qc.attention`."""

    scale: float = 1.0
    softcap: float = 0.0
    mask: fx.Node | None = None


def _replay(editor: Editor, steps: list[_Step], heads: int) -> _Masking | None:
    """The steps as `qc.attention` does them; None if it cannot."""
    now = _Masking()
    before_cap: float | None = None
    for step in steps:
        match step:
            case _Scale(factor):
                mask = now.mask
                if mask is not None and not _is_boolean(mask):
                    mask = editor.call(aten.mul.Tensor, mask, factor)
                now = replace(now, scale=now.scale * factor, mask=mask)
            case _Tanh():
                if now.mask is not None or before_cap is not None:
                    return None
                before_cap, now = now.scale, replace(now, scale=1.0)
            case _Add(term):
                now = replace(now, mask=_added(editor, now.mask, _split(editor, term, heads)))
            case _Allow(condition, inverted):
                allowed = _split(editor, condition, heads)
                if inverted:
                    allowed = editor.call(aten.logical_not.default, allowed)
                now = replace(now, mask=_allowed(editor, now.mask, allowed))
    if before_cap is None:
        return now
    return replace(now, scale=before_cap * now.scale, softcap=now.scale)


def _added(editor: Editor, mask: fx.Node | None, term: fx.Node) -> fx.Node:
    if mask is None:
        return term
    if _is_boolean(mask):
        lowest = torch.finfo(torch.float32).min
        return editor.call(aten.where.ScalarOther, mask, term, lowest)
    return editor.call(aten.add.Tensor, mask, term)


def _allowed(editor: Editor, mask: fx.Node | None, allowed: fx.Node) -> fx.Node:
    if mask is None:
        return allowed
    if _is_boolean(mask):
        return editor.call(aten.logical_and.default, mask, allowed)
    lowest = torch.finfo(torch.float32).min
    return editor.call(aten.where.ScalarOther, allowed, mask, lowest)


def _split(editor: Editor, mask: fx.Node, heads: int) -> fx.Node:
    """``[B * H, S, T]`` to ``[B, H, S, T]``; other masks as they are."""
    shape = _shape(mask)
    if len(shape) == 3 and not isinstance(shape[0], int):
        return editor.call(aten.unflatten.int, mask, 0, [-1, heads])
    return mask


def _agrees(
    probe: Probe,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    steps: list[_Step],
    old: fx.Node,
    new: fx.Node,
) -> bool:
    """Whether both forms give the same on random queries, keys, values and masks."""
    given: dict[fx.Node, Any] = {operand: probe.random(operand) for operand in operands}
    for step in steps:
        if isinstance(step, _Add):
            given[step.term] = probe.random(step.term)
        elif isinstance(step, _Allow):
            allowed = probe.random(step.condition) > -0.5
            allowed[..., 0] = True  # a query that may see nothing has no defined result
            given[step.condition] = ~allowed if step.inverted else allowed
    try:
        return relative_error(probe.run(new, given), probe.run(old, given)) <= TOLERANCE
    except (NotClosedError, RuntimeError):
        return False


def _heads(operand: Any) -> fx.Node | None:
    """A value with axes ``[B, H, ., .]`` behind an operand that may have the first two joined."""
    node = operand
    while isinstance(node, fx.Node) and len(_shape(node)) == 3:
        if node.target not in _JOINS:
            return None
        source = _node(node.args[0])
        same_tail = all(map(same_size, _shape(source)[-2:], _shape(node)[-2:]))
        if not same_tail:
            return None
        node = source
    if not isinstance(node, fx.Node) or len(_shape(node)) != 4:
        return None
    return node if isinstance(_shape(node)[1], int) else None


@dataclass(frozen=True)
class _Keys:
    """Where keys come from: ``permute(source, axes)`` is ``[B, H, T, D]``."""

    source: fx.Node
    axes: tuple[int, ...] = (0, 1, 2, 3)


def _keys(operand: Any) -> _Keys | None:
    """The keys behind the second operand of the product, which has them transposed."""
    operand = _node(operand)
    if len(_shape(operand)) == 3 and _order(operand, 3) == (0, 2, 1):
        joined = _heads(operand.args[0])
        return None if joined is None else _Keys(joined)
    key = _heads(operand)
    if key is None:
        return None
    order = _order(key, 4)
    if order is None:
        return _Keys(key, (0, 1, 3, 2))
    return _Keys(_node(key.args[0]), (order[0], order[1], order[3], order[2]))


def _order(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """The order that a permutation puts axes in; None if the node is no permutation."""
    if node.target is aten.permute.default:
        axes: Any = node.args[1]
        return tuple(axis % rank for axis in axes)
    if node.target is aten.transpose.int:
        order = list(range(rank))
        a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return None


def _without_repeats(node: fx.Node) -> int:
    """Undoes the repetition of keys and values, which the operator does itself."""
    sources = [_unrepeated(_node(operand)) for operand in node.args[1:3]]
    if any(source is None for source in sources):
        return 0
    if len({_shape(source)[1] for source in sources}) != 1:
        return 0
    node.args = (node.args[0], *sources, *node.args[3:])
    return 1


def _unrepeated(node: fx.Node) -> fx.Node | None:
    heads = _shape(node)[1]
    if node.target is aten.repeat_interleave.self_int and node.args[2:3] == (1,):
        return _node(node.args[0])
    if node.target is aten.expand.default:
        source = _node(node.args[0])
        return source if _shape(source)[1] == 1 and len(_shape(source)) == 4 else None
    if node.target is not aten.reshape.default:
        return None
    expanded = _node(node.args[0])
    if expanded.target is not aten.expand.default or len(_shape(expanded)) != 5:
        return None
    inserted = _node(expanded.args[0])
    if inserted.target is not aten.unsqueeze.default or inserted.args[1] != 2:
        return None
    source = _node(inserted.args[0])
    repeats = _shape(expanded)[2]
    return source if _shape(source)[1] * repeats == heads else None


def _number(probe: Probe, value: Any) -> float | None:
    """A constant factor: a literal, or a weight with one element."""
    if isinstance(value, (int, float)):
        return float(value) or None
    if not isinstance(value, fx.Node) or torch.Size(probe.shape(value)).numel() != 1:
        return None
    try:
        return float(probe.run(value, {})) or None
    except NotClosedError:
        return None


def _silences(probe: Probe, value: Any) -> bool:
    """Whether a value is so low everywhere that its scores get no weight."""
    if isinstance(value, (int, float)):
        return value <= _SILENT
    if not isinstance(value, fx.Node) or not isinstance(value.meta["val"], Tensor):
        return False
    try:
        found = probe.run(value, {})
    except NotClosedError:
        return False
    return bool((found <= _SILENT).all())


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    if not node.users and node.op == "call_function":
        operands = node.all_input_nodes
        graph.erase_node(node)
        for operand in operands:
            if operand.meta.get("val") is not None:
                _erase_unused(graph, operand)


def _is_boolean(node: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def _shape(value: Any) -> Any:
    return value.meta["val"].shape


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value
