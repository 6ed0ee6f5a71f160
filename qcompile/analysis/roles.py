"""What a linear reads, found by dataflow: names that recipes may use on any architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import fx

from qcompile.analysis.declarations.movements import DECLARATIONS as MOVEMENTS
from qcompile.ir import dialect
from qcompile.ir.program import Program

aten = torch.ops.aten

DOWN_PROJ = "down_proj"
"""A linear behind an activation: the second half of a feed-forward block."""
O_PROJ = "o_proj"
"""A linear behind attention."""
NORMED = "normed"
"""A linear behind a normalization: query, key, value, gate, up, and the output projection."""

_ACTIVATIONS = frozenset({dialect.act, dialect.gated_act, aten.relu.default})

_ROLES: Mapping[object, str] = MappingProxyType(
    {
        **dict.fromkeys(_ACTIVATIONS, DOWN_PROJ),
        dialect.attention: O_PROJ,
        dialect.rms_norm: NORMED,
        dialect.layer_norm: NORMED,
    }
)


def linear_role(linear: fx.Node) -> str | None:
    """What stands in front of a linear, through operators that only move channels.

    Args:
        linear: A call of `aten.linear`.

    Returns:
        `DOWN_PROJ`, `O_PROJ`, `NORMED`, or None for anything else.
    """
    node = linear.args[0]
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in _ROLES:
            return _ROLES[node.target]
        through = node.target in MOVEMENTS or node.target in (dialect.transform, aten.mul.Tensor)
        if not through:
            return None
        node = node.args[0]
    return None


def weight_name(linear: fx.Node) -> str:
    """The name of the stored weight of a linear."""
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    return str(weight.target)


def linears_by_input(program: Program) -> Iterator[tuple[fx.Node, list[fx.Node]]]:
    """Values that linears over stored weights read, in graph order, each with these linears."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for linear in program.calls(aten.linear.default):
        x, weight = linear.args[:2]
        if isinstance(x, fx.Node) and isinstance(weight, fx.Node) and weight.op == "get_attr":
            groups.setdefault(x, []).append(linear)
    yield from groups.items()
