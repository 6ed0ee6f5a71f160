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
    hidden = expert_hidden(x, index, up, up_bias, kind, gated, limit, offset)
    return expert_output(hidden, index, weight, down, down_bias)


def expert_hidden(
    x: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    kind: str,
    gated: bool,
    limit: float,
    offset: float,
) -> Tensor:
    """The first half of `experts`: ``h(up_e x + up_bias_e)``, what the second matrices read.

    Args:
        x: As for `experts`, like all others.
        index: ``[T, K]``.
        up: ``[E, F, D]``, or ``[E, 2 F, D]``.
        up_bias: One row for each expert, or None.
        kind: The activation.
        gated: Whether `up` holds a gate as well.
        limit: Bound of both halves.
        offset: Added to the half that is no gate.

    Returns:
        ``[T, K, F]``; 0 where `index` names no expert.
    """
    places, rows = [], []
    for expert in range(up.shape[0]):
        token, choice = torch.where(index == expert)
        bias = None if up_bias is None else up_bias[expert]
        hidden = torch.nn.functional.linear(x[token], up[expert], bias)
        places.append(token * index.shape[1] + choice)
        rows.append(_activate(hidden, kind, gated, limit, offset))
    width = rows[0].shape[-1]
    empty = x.new_zeros(index.numel(), width)
    return empty.index_copy(0, torch.cat(places), torch.cat(rows)).reshape(*index.shape, width)


def expert_output(
    hidden: Tensor, index: Tensor, weight: Tensor, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    """The second half of `experts`: ``sum_k weight_k * (down_e hidden_k + down_bias_e)``.

    Args:
        hidden: ``[T, K, F]``, from `expert_hidden`.
        index: As for `experts`, like all others.
        weight: ``[T, K]``.
        down: ``[E, D, F]``.
        down_bias: ``[E, D]``, or None.

    Returns:
        ``[T, D]``.
    """
    output = hidden.new_zeros(index.shape[0], down.shape[1])
    for expert in range(down.shape[0]):
        token, choice = torch.where(index == expert)
        bias = None if down_bias is None else down_bias[expert]
        result = torch.nn.functional.linear(hidden[token, choice], down[expert], bias)
        output = output.index_add(0, token, result * weight[token, choice].unsqueeze(-1))
    return output


def _activate(hidden: Tensor, kind: str, gated: bool, limit: float, offset: float) -> Tensor:
    if not gated:
        return act(hidden, kind)
    gate, other = hidden.chunk(2, dim=-1)
    if limit > 0:
        gate, other = gate.clamp(max=limit), other.clamp(min=-limit, max=limit)
    return act(gate, kind) * (other + offset)
