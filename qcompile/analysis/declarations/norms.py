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
    S,
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
    bases.axes.block(
        axis, node.name, "the mean square of the norm weighs all channels alike", {D, S}
    )
    vectors = [v for v in (gain, bias) if v is not None]
    if not all(isinstance(v, fx.Node) and v.op == "get_attr" for v in vectors):
        bases.axes.block(axis, node.name, "the norm's gain is computed")
        return [x]
    for vector in vectors:
        bases.port(out, vector, 0, PortRole.GAIN, {P})
        bases.port(out, vector, 0, PortRole.SOURCE, {D})
    if isinstance(bias, fx.Node):
        bases.port(out, bias, 0, PortRole.SOURCE, {S})
    else:
        bases.axes.block(out, node.name, "the norm has no bias to absorb a shift", {S})
    if not vectors:
        bases.axes.block(out, node.name, "the norm has no gain to absorb a scale", {D})
    bases.axes.normalize(axis)
    bases.norms.append(Norm(node, axis, centred))
    offender = None if not vectors else gain_offender(node)
    if offender is not None:
        bases.axes.block(axis, node.name, f"the norm's gain feeds {offender}", {R})
    return [x]


def gain_offender(node: fx.Node) -> str | None:
    """What keeps a norm's gain and bias from being folded into its consumers, or None."""
    consumers, offender = gain_consumers(node)
    has_bias = node.target is dialect.layer_norm and node.args[2] is not None
    if offender is None and has_bias and any(c.target is dialect.experts for c in consumers):
        return "routed experts, which have no shared bias for its shift"
    return offender


def gain_consumers(node: fx.Node) -> tuple[list[fx.Node], str | None]:
    """The linears and routed experts that read a norm, and the first reader that is neither.

    Operators that keep rows as they are (a reshape in front of experts, a cast) are looked
    through.
    """
    found: list[fx.Node] = []
    width = node.meta["val"].shape[-1]
    for user in node.users:
        if user.op == "output":
            return found, "an output"
        if user.target in _KEEP_ROWS and user.args[0] is node:
            if user.meta["val"].shape[-1] != width:
                return found, format_target(user.target)
            behind, offender = gain_consumers(user)
            found += behind
            if offender is not None:
                return found, offender
        elif _absorbs(user, node):
            found.append(user)
        else:
            return found, format_target(user.target)
    return list(dict.fromkeys(found)), None


def _absorbs(user: fx.Node, value: fx.Node) -> bool:
    """Whether a call is a layer over stored weights whose input is a value, and nothing else."""
    if user.target is aten.linear.default:
        weight = user.args[1]
        reads = user.args[0] is value and value not in user.args[1:]
        return reads and isinstance(weight, fx.Node) and weight.op == "get_attr"
    if user.target is dialect.experts:
        up = user.args[3]
        reads = user.args[0] is value and value not in user.args[1:]
        return reads and isinstance(up, fx.Node) and up.op == "get_attr"
    return False


_KEEP_ROWS = frozenset({aten.view.default, aten.reshape.default, aten.to.dtype, aten.clone.default})
"""Operators that leave every row of channels whole, where the last dimension keeps its size."""

DECLARATIONS: dict[Any, Declaration] = {
    dialect.rms_norm: _rms_norm,
    dialect.layer_norm: _layer_norm,
}
