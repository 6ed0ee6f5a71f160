"""Routed experts: each token's feed-forward block is a weighted sum of a few of many."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.gated_act.reference import act


def experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    kind: str,
    gated: bool,
    limit: float,
    offset: float,
) -> Tensor:
    """``sum_k weight_k * (down_e h(up_e x + up_bias_e) + down_bias_e)`` with ``e = index_k``.

    `h` is the activation, or, when `gated`, ``activation(g) * (u + offset)`` of the first and the
    second half of its argument, clamped as `limit` says.

    Args:
        x: ``[T, D]``.
        index: ``[T, K]`` int64: the experts of each token; numbers of ``E`` and more name none.
        weight: ``[T, K]``.
        up: ``[E, F, D]``, or ``[E, 2 F, D]`` when `gated`: the gate's rows, then the others.
        up_bias: ``[E, F]`` or ``[E, 2 F]``, or None.
        down: ``[E, D, F]``.
        down_bias: ``[E, D]``, or None.
        kind: One of `qcompile.kernels.gated_act.reference.ACTIVATIONS`.
        gated: Whether `up` holds a gate as well.
        limit: Bound of the gate from above, and of the other half from both sides; 0 is none.
        offset: Added to the other half.

    Returns:
        ``[T, D]``.

    Source: Shazeer et al. 2017, equation 1; Fedus et al. 2021.
    """
    output = torch.zeros_like(x)
    for expert in range(up.shape[0]):
        token, choice = torch.where(index == expert)
        hidden = torch.nn.functional.linear(
            x[token], up[expert], None if up_bias is None else up_bias[expert]
        )
        hidden = _activate(hidden, kind, gated, limit, offset)
        result = torch.nn.functional.linear(
            hidden, down[expert], None if down_bias is None else down_bias[expert]
        )
        output = output.index_add(0, token, result * weight[token, choice].unsqueeze(-1))
    return output


def _activate(hidden: Tensor, kind: str, gated: bool, limit: float, offset: float) -> Tensor:
    if not gated:
        return act(hidden, kind)
    gate, other = hidden.chunk(2, dim=-1)
    if limit > 0:
        gate, other = gate.clamp(max=limit), other.clamp(min=-limit, max=limit)
    return act(gate, kind) * (other + offset)
