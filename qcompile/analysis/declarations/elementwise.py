"""Sums, products, gains and activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.analysis.axes import ALL_FAMILIES, MATRICES
from qcompile.analysis.families import Family, PortRole
from qcompile.analysis.features import (
    BasisMap,
    D,
    Declaration,
    P,
    R,
    S,
    aligned,
    elements_of,
    is_size,
    operand_of,
    pass_on,
    rank_of,
    single_feature,
    size_of,
)
from qcompile.ir import dialect
from qcompile.ir.text import format_target

aten = torch.ops.aten


def _add(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    if not isinstance(node.args[1], fx.Node) or is_size(node.args[1]):
        return []
    a, b = operand_of(node, 0), operand_of(node, 1)
    if a.op == "get_attr" or b.op == "get_attr":
        vector, x = (a, b) if a.op == "get_attr" else (b, a)
        return _add_vector(bases, node, x, vector)
    shared = aligned(bases, a, b)
    if shared is None:
        return []
    (dims_a, dims_b), dims = shared
    axis, other = bases.of(a, dims_a), bases.of(b, dims_b)
    bases.axes.link(axis, other, MATRICES)
    bases.axes.block(other, node.name, "the other operand of the sum takes the shift", {S})
    bases.give(node, dims, axis)
    return [a, b]


def _scaled(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """A value times a number."""
    for axis in bases.features.get(operand_of(node, 0), {}).values():
        bases.axes.block(axis, node.name, _SCALED, {S})
    return pass_on(bases, node)


_SCALED = "it is scaled, and a shift would be, too"


def _add_vector(bases: BasisMap, node: fx.Node, x: fx.Node, vector: fx.Node) -> list[fx.Node]:
    if rank_of(vector) == 0 or rank_of(x) == 0:
        return []
    last = (rank_of(node) - 1,)
    fits = size_of(vector, (rank_of(vector) - 1,)) == size_of(node, last)
    if not fits or rank_of(x) != rank_of(node):
        return []
    axis = bases.of(x, (rank_of(x) - 1,))
    bases.port(axis, vector, rank_of(vector) - 1, PortRole.SOURCE, MATRICES)
    bases.give(node, last, axis)
    return [x]


def _multiply(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    other = node.args[1]
    x = operand_of(node, 0)
    if not isinstance(other, fx.Node) or is_size(other):
        return _scaled(bases, node)
    if x.op == "get_attr":
        x, other = other, x
    if other.op == "get_attr":
        return _gain(bases, node, x, other)
    if rank_of(other) == rank_of(x):
        for value, factor in ((x, other), (other, x)):
            dims = single_feature(bases, value)
            if dims is not None and all(size_of(factor, (d,)) == 1 for d in dims):
                axis = bases.of(value, dims)
                bases.give(node, dims, axis)
                bases.axes.block(axis, node.name, _SCALED, {S})
                return [x, other]
    return _product(bases, node, x, other, families=frozenset({P}))


def _gain(bases: BasisMap, node: fx.Node, x: fx.Node, gain: fx.Node) -> list[fx.Node]:
    if elements_of(gain) == 1:
        dims = single_feature(bases, x)
        if dims is None:
            return []
        axis = bases.of(x, dims)
        bases.give(node, dims, axis)
        bases.axes.block(axis, node.name, _SCALED, {S})
        return [x]
    if rank_of(x) == 0:
        return []
    last = (rank_of(x) - 1,)
    if {size_of(gain, (rank_of(gain) - 1,)), elements_of(gain)} != {size_of(x, last)}:
        return []
    axis, out = bases.of(x, last), bases.fresh(node, (rank_of(node) - 1,))
    vector_axis = rank_of(gain) - 1
    bases.axes.link(axis, out, {P})
    bases.port(out, gain, vector_axis, PortRole.GAIN, {P})
    bases.port(axis, gain, vector_axis, PortRole.SINK, {D})
    bases.port(out, gain, vector_axis, PortRole.SOURCE, {D})
    for blocked in (axis, out):
        bases.axes.block(blocked, node.name, "a gain works on single channels", {R})
        bases.axes.block(blocked, node.name, _SCALED, {S})
    return [x]


def _gated_act(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    return _product(bases, node, operand_of(node, 1), operand_of(node, 0), families=frozenset({P}))


def _product(
    bases: BasisMap, node: fx.Node, linear: fx.Node, other: fx.Node, families: frozenset[Family]
) -> list[fx.Node]:
    """``linear * f(other)``: both permute together, only the first may be scaled."""
    shared = aligned(bases, linear, other)
    if shared is None:
        return []
    (dims, dims_other), out_dims = shared
    axis, gate = bases.of(linear, dims), bases.of(other, dims_other)
    bases.axes.link(axis, gate, families)
    out = bases.fresh(node, out_dims)
    bases.axes.link(axis, out, families | {D})
    for blocked in (axis, gate, out):
        bases.axes.block(blocked, node.name, "channels are multiplied one by one", {R, S})
    bases.axes.block(gate, node.name, "a nonlinear function of it is multiplied", {D})
    return [linear, other]


def _act(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, kind = operand_of(node, 0), node.args[1]
    return _activation(bases, node, x, str(kind), homogeneous=kind in ("relu", "identity"))


def _aten_activation(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    name = format_target(node.target).removeprefix("aten.")
    return _activation(bases, node, operand_of(node, 0), name, homogeneous=name == "relu")


def _activation(
    bases: BasisMap, node: fx.Node, x: fx.Node, kind: str, *, homogeneous: bool
) -> list[fx.Node]:
    for dims, axis in list(bases.features.get(x, {}).items()):
        out = bases.fresh(node, dims)
        kept = {P, D} if homogeneous else {P}
        bases.axes.link(axis, out, kept)
        for blocked in (axis, out):
            bases.axes.block(
                blocked, node.name, f"{kind} works on single channels", ALL_FAMILIES - kept
            )
    return [x]


DECLARATIONS: dict[Any, Declaration] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mul.Tensor: _multiply,
    aten.div.Tensor: _multiply,
    aten.neg.default: _scaled,
    aten.relu.default: _aten_activation,
    dialect.act: _act,
    dialect.gated_act: _gated_act,
}
