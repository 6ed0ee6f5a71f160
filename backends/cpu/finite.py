"""Float weights that no model can have."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.backends.cpu import expert_ops, ops
from qcompile.errors import ModelError
from qcompile.ir import dialect
from qcompile.ir.program import Program

_aten = torch.ops.aten
_LAYERS = (
    _aten.linear.default,
    _aten.embedding.default,
    _aten.convolution.default,
    _aten.conv1d.default,
    _aten.conv2d.default,
    _aten.conv3d.default,
    dialect.rms_norm,
    dialect.layer_norm,
    dialect.experts,
    dialect.expert_hidden,
    dialect.expert_output,
    ops.linear,
    expert_ops.experts,
)
"""What multiplies weights with activations. Elsewhere an infinity may be meant, as in a mask."""


def refuse_non_finite(program: Program) -> None:
    """Reads the float weights of layers and norms once; weights that became codes were checked.

    Raises:
        ModelError: Names the first weight with NaN or infinite entries.
    """
    checked: set[str] = set()
    for layer in program.calls(*_LAYERS):
        for node in layer.all_input_nodes:
            name = str(node.target)
            if node.op == "get_attr" and name not in checked and _is_floating(node):
                checked.add(name)
                _check(program, name)


def _is_floating(node: fx.Node) -> bool:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype.is_floating_point


def _check(program: Program, name: str) -> None:
    weight = program.weights.materialize(name)
    if weight.numel() == 0:
        return
    # One pass without a mask as large as the weight; a NaN is its own least and largest.
    if all(torch.isfinite(extreme) for extreme in torch.aminmax(weight)):
        return
    count = int((~torch.isfinite(weight)).sum())
    raise ModelError(
        f"weight '{name}' has {count} entries that are NaN or infinite",
        remedy="the checkpoint is damaged or overflowed: get it again, or convert it again",
    )
