"""Linears, convolutions, embeddings and routed experts: where transforms are absorbed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.analysis.axes import ALL_FAMILIES, MATRICES
from qcompile.analysis.families import PortRole
from qcompile.analysis.features import (
    BasisMap,
    D,
    Declaration,
    P,
    R,
    S,
    operand_of,
    rank_of,
    size_of,
)
from qcompile.ir import dialect

aten = torch.ops.aten


def _linear(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, weight = operand_of(node, 0), operand_of(node, 1)
    bias = node.args[2] if len(node.args) > 2 else None
    axis, out = bases.of(x, (rank_of(x) - 1,)), bases.fresh(node, (rank_of(node) - 1,))
    if weight.op != "get_attr":
        bases.axes.block(axis, node.name, "the weight of the linear is computed or quantized")
        bases.axes.block(out, node.name, "the weight of the linear is computed or quantized")
        return [x]
    bases.port(axis, weight, 1, PortRole.SINK)
    # A shift goes into the bias; a linear without one is given one.
    bases.port(out, weight, 0, PortRole.SOURCE, ALL_FAMILIES if bias is None else MATRICES)
    _add_bias(bases, node, out, bias)
    return [x]


def _convolution(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, weight = operand_of(node, 0), operand_of(node, 1)
    bias = node.args[2] if len(node.args) > 2 else None
    groups = node.args[6] if len(node.args) > 6 else 1
    axis, out = bases.of(x, (1,)), bases.fresh(node, (1,))
    if weight.op != "get_attr" or groups != 1:
        reason = "a grouped convolution" if groups != 1 else "the weight is computed"
        bases.axes.block(axis, node.name, reason)
        bases.axes.block(out, node.name, reason)
        return [x]
    bases.port(axis, weight, 1, PortRole.SINK, MATRICES)
    bases.port(out, weight, 0, PortRole.SOURCE, MATRICES)
    bases.axes.block(axis, node.name, "a convolution pads with zeros", {S})
    _add_bias(bases, node, out, bias)
    return [x]


def _add_bias(bases: BasisMap, node: fx.Node, out: int, bias: Any) -> None:
    if isinstance(bias, fx.Node) and bias.op == "get_attr":
        bases.port(out, bias, 0, PortRole.SOURCE)
    elif bias is not None:
        bases.axes.block(out, node.name, "its bias is computed")


def _embedding(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    weight = operand_of(node, 0)
    out = bases.fresh(node, (rank_of(node) - 1,))
    if weight.op == "get_attr":
        bases.port(out, weight, 1, PortRole.SOURCE)
    else:
        bases.axes.block(out, node.name, "the table is computed or quantized")
    return []


def _experts(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, _, _, up, up_bias, down, down_bias, kind, gated, limit, _ = node.args
    assert isinstance(x, fx.Node)
    axis, out = bases.of(x, (rank_of(x) - 1,)), bases.fresh(node, (rank_of(node) - 1,))
    weights = [w for w in (up, up_bias, down, down_bias) if w is not None]
    if not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights):
        bases.axes.block(axis, node.name, "the experts' weights are computed")
        return [x]
    assert isinstance(up, fx.Node)
    assert isinstance(down, fx.Node)
    for blocked in (axis, out):
        bases.axes.block(blocked, node.name, "routed experts share no bias", {S})
    bases.port(axis, up, 2, PortRole.SINK, MATRICES)
    bases.port(out, down, 1, PortRole.SOURCE, MATRICES)
    if isinstance(down_bias, fx.Node):
        bases.port(out, down_bias, 1, PortRole.SOURCE, MATRICES)
    width = size_of(down, (2,))
    hidden = bases.axes.new(width)
    bases.port(hidden, down, 2, PortRole.SINK, MATRICES)
    halves = {0: {P}, width: {P, D}} if gated else {0: {P, D} if kind == "relu" else {P}}
    for start, families in halves.items():
        for rows in (up, up_bias):
            if isinstance(rows, fx.Node):
                bases.port(hidden, rows, 1, PortRole.SOURCE, families, weight_start=start)
    bases.axes.block(hidden, node.name, "inside the experts an activation is applied", {R})
    if limit or up_bias is not None:
        bases.axes.block(hidden, node.name, "inside the experts values are clamped or shifted", {D})
    return [x]


DECLARATIONS: dict[Any, Declaration] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.embedding.default: _embedding,
    dialect.experts: _experts,
}
