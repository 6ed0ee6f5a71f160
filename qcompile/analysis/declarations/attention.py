"""Rotary embeddings, caches and attention: bases per head, shared by groups of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.analysis.axes import ALL_FAMILIES, MATRICES
from qcompile.analysis.families import PortRole
from qcompile.analysis.features import (
    BasisMap,
    Declaration,
    P,
    R,
    S,
    operand_of,
    rank_of,
    single_feature,
    size_of,
)
from qcompile.ir import dialect
from qcompile.ir.caches import cache_format

aten = torch.ops.aten


def _rope(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, cos = operand_of(node, 0), operand_of(node, 1)
    dims = single_feature(bases, x)
    if dims is None or 3 not in dims:
        return []
    axis = bases.of(x, dims)
    bases.axes.cut(axis, size_of(x, (3,)))
    bases.axes.pair(axis, size_of(cos, (rank_of(cos) - 1,)), bool(node.args[3]))
    reason = "a rotary embedding mixes channels in pairs"
    bases.axes.block(axis, node.name, reason, {P, R, S})
    bases.give(node, dims, axis)
    return [x]


def _kv_append(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    past, new = operand_of(node, 0), operand_of(node, 1)
    dims = single_feature(bases, new)
    if dims is None:
        return []
    axis = bases.of(new, dims)
    bases.give(node, dims, axis)
    if past.op == "placeholder":
        name, size = str(past.target), bases.axes.sizes[axis]
        bases.axes.port(axis, name, 1, size, PortRole.CACHE, MATRICES)
        bases.axes.block(axis, node.name, "the cache holds it without a shift", {S})
    format = cache_format(node)
    if format.rounds:
        bases.axes.block(axis, node.name, f"the cache rounds it to {format.name}", ALL_FAMILIES)
    return [past, new]


def _attention(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    query, key, value = (operand_of(node, i) for i in range(3))
    heads, kv_heads = size_of(query, (1,)), size_of(key, (1,))
    axes = [_head_axis(bases, x) for x in (query, key, value)]
    out = bases.fresh(node, (1, 3))
    width, value_width = size_of(query, (3,)), size_of(value, (3,))
    may_see_nothing = any(operand is not None for operand in node.args[3:6])
    for axis in axes[:2]:
        bases.axes.block(axis, node.name, "queries are multiplied by keys", {S})
    if may_see_nothing:
        for axis in (axes[2], out):
            reason = "a query that may attend to nothing gives zeros"
            bases.axes.block(axis, node.name, reason, {S})
    for head in range(heads):
        shared = head // (heads // kv_heads)
        bases.axes.link(
            axes[1],
            axes[0],
            MATRICES,
            a_start=shared * width,
            b_start=head * width,
            size=width,
            dual=True,
        )
        a, b = shared * value_width, head * value_width
        bases.axes.link(axes[2], out, a_start=a, b_start=b, size=value_width)
    return [query, key, value]


def _head_axis(bases: BasisMap, x: fx.Node) -> int:
    """The axis of heads side by side."""
    dims = single_feature(bases, x)
    if dims == (1, 3) or size_of(x, (1,)) != 1 or dims is None:
        return bases.of(x, (1, 3))
    axis = bases.of(x, dims)  # one head: its axis of size 1 may have been dropped
    bases.give(x, (1, 3), axis)
    return axis


DECLARATIONS: dict[Any, Declaration] = {
    dialect.rope: _rope,
    dialect.kv_append: _kv_append,
    dialect.attention: _attention,
}
