"""Normalizations: rotations pass their core, scales stop there, gains are ports."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.analysis.families import PortRole
from qcompile.analysis.features import (
    BasisMap,
    D,
    Declaration,
    Norm,
    P,
    R,
    operand_of,
    rank_of,
    single_feature,
)
from qcompile.ir import dialect
from qcompile.ir.text import format_target

aten = torch.ops.aten


def _rms_norm(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    return _norm(bases, node, gain=node.args[1], bias=None, centred=False)


def _layer_norm(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    return _norm(bases, node, gain=node.args[1], bias=node.args[2], centred=True)


def _norm(bases: BasisMap, node: fx.Node, gain: Any, bias: Any, centred: bool) -> list[fx.Node]:
    x = operand_of(node, 0)
    whole = single_feature(bases, x)
    last = (rank_of(x) - 1,)
    if whole is not None and whole != last:
        bases.block_all(x, "a norm works on each head by itself")
        out = bases.fresh(node, whole)
        bases.axes.block(out, node.name, "a norm works on each head by itself")
        return [x]
    axis, out = bases.of(x, last), bases.fresh(node, last)
    bases.axes.link(axis, out, {P, R})
    bases.axes.block(axis, node.name, "the mean square of the norm weighs all channels alike", {D})
    vectors = [v for v in (gain, bias) if v is not None]
    if not all(isinstance(v, fx.Node) and v.op == "get_attr" for v in vectors):
        bases.axes.block(axis, node.name, "the norm's gain is computed")
        return [x]
    for vector in vectors:
        bases.port(out, vector, 0, PortRole.GAIN, {P})
        bases.port(out, vector, 0, PortRole.SOURCE, {D})
    if not vectors:
        bases.axes.block(out, node.name, "the norm has no gain to absorb a scale", {D})
    bases.norms.append(Norm(node, axis, centred))
    offender = None if not vectors else gain_offender(node)
    if offender is not None:
        bases.axes.block(axis, node.name, f"the norm's gain feeds {offender}", {R})
    return [x]


def gain_offender(node: fx.Node) -> str | None:
    """What keeps a norm's gain from being folded into its consumers; None if nothing does."""
    for user in node.users:
        if user.op == "output":
            return "an output"
        if user.target is dialect.experts and user.args[0] is node:
            continue
        is_input = user.target is aten.linear.default and user.args[0] is node
        weight = user.args[1] if is_input else None
        if not is_input or not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return format_target(user.target)
    return None


DECLARATIONS: dict[Any, Declaration] = {
    dialect.rms_norm: _rms_norm,
    dialect.layer_norm: _layer_norm,
}
