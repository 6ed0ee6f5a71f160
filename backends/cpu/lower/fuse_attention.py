"""Rotation, cache append and attention become one node, with heads side by side."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.cached_attention import cached_attention
from qcompile.ir import dialect
from qcompile.ir.caches import cache_format
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Role
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult

aten = torch.ops.aten


class FuseAttention(Pass):
    """Matches the library's attention kernel.

    Before::

        k = kv_append(past_key, rope(transpose(view(key)), cos, sin))
        v = kv_append(past_value, transpose(view(value)))
        a = attention(rope(transpose(view(query)), cos, sin), k, v, ...)
        reshape(transpose(a))

    After::

        cpu_attention(query, key, value, past_key, past_value, mask, bias, cos, sin, ...)

    or ``cpu_cached_attention(..., key_format, key_group_size, value_format, value_group_size)``
    where a cache rounds. Every part but the attention itself is optional: what is not there, or has
    another user, stays outside of the node.

    A cache that other nodes read, such as the latent of multi-head latent attention, cannot be
    appended to inside of a node. All caches of such a model grow as plain tensors then, and an
    attention over them stays one of standard operators, as one of a decoder over its encoder's
    states does.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every attention that the kernel can compute."""
        del context
        result = PassResult()
        in_place = all(_has_one_reader(node) for node in program.calls(dialect.kv_append))
        editor = Editor(program)
        mask = next(
            (
                node
                for node, port in zip(program.inputs, program.signature.inputs, strict=True)
                if port.role is Role.ATTENTION_MASK
            ),
            None,
        )
        for node in program.calls(dialect.attention):
            if _attends_to_itself(node) or (in_place and all(map(_is_append, node.args[1:3]))):
                _fuse(editor, node, mask)
                result.rewrites += 1
        return result


def _has_one_reader(append: fx.Node) -> bool:
    """Whether all that reads a cache is one attention over two caches, and the output."""
    readers = [user for user in append.users if user.op != "output"]
    if len(readers) != 1 or readers[0].target is not dialect.attention:
        return False
    key, value = readers[0].args[1:3]
    return key is not value and _is_append(key) and _is_append(value)


def _is_append(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is dialect.kv_append


def _attends_to_itself(attention: fx.Node) -> bool:
    """Whether there are as many keys as queries, so that no cache stands before them."""
    query, key = attention.args[:2]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    return str(query.meta["val"].shape[2]) == str(key.meta["val"].shape[2])


@dataclass(frozen=True)
class _Rotation:
    query: fx.Node  # before it
    key: fx.Node  # before it
    cos: fx.Node
    sin: fx.Node
    interleaved: bool


def _fuse(editor: Editor, node: fx.Node, attention_mask: fx.Node | None) -> None:
    query, key, value, mask, key_mask, sinks, scale, causal, window, softcap = node.args
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    assert isinstance(value, fx.Node)
    heads, kv_heads = int(query.meta["val"].shape[1]), int(key.meta["val"].shape[1])
    past_key, new_key = _split_append(key)
    past_value, new_value = _split_append(value)
    if (past_key is None) != (past_value is None):
        past_key, new_key, past_value, new_value = None, key, None, value
    rotation = _common_rotation(query, new_key)
    with editor.before(node):
        if rotation is not None:
            query, new_key = rotation.query, rotation.key
        flat = [_side_by_side(editor, x) for x in (query, new_key, new_value)]
        cos, sin = (rotation.cos, rotation.sin) if rotation else (None, None)
        if past_key is not None and key_mask is None:
            key_mask = attention_mask
        formats = [cache_format(x) for x in (key, value)] if past_key is not None else []
        rounds = any(format.rounds for format in formats)
        fused = editor.call(
            cached_attention if rounds else ops.fused_attention,
            *flat,
            *(past_key, past_value, key_mask, _additive(editor, mask), cos, sin, sinks),
            *(heads, kv_heads, scale, causal, window, softcap),
            rotation.interleaved if rotation else False,
            *(x for f in formats if rounds for x in (f.name, f.group_size)),
        )
        out, present_key, present_value = (
            editor.call(operator.getitem, fused, i) for i in range(3)
        )
        _replace_output(editor, node, out, heads)
    if past_key is not None:
        key.replace_all_uses_with(present_key)
        value.replace_all_uses_with(present_value)


def _split_append(node: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """The past and the new positions of a key or value, if a cache holds it."""
    if not _is_append(node):
        return None, node
    past, new = node.args[:2]
    assert isinstance(past, fx.Node)
    assert isinstance(new, fx.Node)
    return past, new


def _common_rotation(query: fx.Node, key: fx.Node) -> _Rotation | None:
    if query.target is not dialect.rope or key.target is not dialect.rope:
        return None
    same = all(_same_value(a, b) for a, b in zip(query.args[1:], key.args[1:], strict=True))
    if not same or len(key.users) != 1 or len(query.users) != 1:
        return None
    source, cos, sin, interleaved = query.args
    key_source = key.args[0]
    assert isinstance(source, fx.Node)
    assert isinstance(key_source, fx.Node)
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    return _Rotation(source, key_source, cos, sin, bool(interleaved))


def _same_value(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, fx.Node) and a == b)


def _side_by_side(editor: Editor, x: fx.Node) -> fx.Node:
    """``[B, H, S, D]``  to  ``[B, S, H * D]``, undoing the views that split the heads."""
    if x.target is aten.transpose.int and sorted(a % 4 for a in x.args[1:]) == [1, 2]:  # type: ignore[operator]
        split = x.args[0]
        assert isinstance(split, fx.Node)
        if split.target in (aten.view.default, aten.reshape.default):
            whole = split.args[0]
            assert isinstance(whole, fx.Node)
            heads, width = split.meta["val"].shape[2:]
            if len(whole.meta["val"].shape) == 3 and whole.meta["val"].shape[2] == heads * width:
                return whole
    else:
        split = editor.call(aten.transpose.int, x, 1, 2)
    heads, width = split.meta["val"].shape[2:]
    sizes = [editor.call(aten.sym_size.int, split, axis) for axis in (0, 1)]
    return editor.call(aten.reshape.default, split, [*sizes, int(heads) * int(width)])


def _additive(editor: Editor, mask: Any) -> Any:
    """A boolean mask as numbers to add."""
    if mask is None or mask.meta["val"].dtype != torch.bool:
        return mask
    minus_infinity = editor.call(aten.scalar_tensor.default, float("-inf"), dtype=torch.float32)
    zero = editor.call(aten.scalar_tensor.default, 0.0, dtype=torch.float32)
    return editor.call(aten.where.self, mask, zero, minus_infinity)


def _replace_output(editor: Editor, node: fx.Node, out: fx.Node, heads: int) -> None:
    """Lets the users of ``[B, H, S, D]`` read ``[B, S, H * D]`` directly where they join heads."""
    for transpose in [u for u in node.users if _swaps_heads(u)]:
        for join in [u for u in transpose.users if _joins_heads(u, out)]:
            editor.replace(join, out)
        if not transpose.users:
            editor.graph.erase_node(transpose)
    if node.users:
        width = int(out.meta["val"].shape[-1]) // heads
        sizes = [editor.call(aten.sym_size.int, out, axis) for axis in (0, 1)]
        split = editor.call(aten.view.default, out, [*sizes, heads, width])
        node.replace_all_uses_with(editor.call(aten.transpose.int, split, 1, 2))
    editor.graph.erase_node(node)


def _swaps_heads(node: fx.Node) -> bool:
    return node.target is aten.transpose.int and sorted(a % 4 for a in node.args[1:]) == [1, 2]  # type: ignore[operator]


def _joins_heads(node: fx.Node, out: fx.Node) -> bool:
    return node.target in (aten.view.default, aten.reshape.default) and str(
        node.meta["val"].shape
    ) == str(out.meta["val"].shape)
