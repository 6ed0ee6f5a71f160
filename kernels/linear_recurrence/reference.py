"""Recurrences that are linear in a matrix: linear attention, delta rules, state spaces."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_recurrence(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    rate: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each head keeps a matrix that decays, takes in one outer product per position, and is read.

    For each position, with its ``q, k, v, d`` and, if there is one, its rate ``b``::

        state = exp(d) * state                    # of row i by exp(d_i), or all of it by one number
        new   = v                                 # without a rate
        new   = b * (v - k @ state)               # with one: only what the state does not say yet
        state = state + outer(k, new)
        out   = q @ state

    Without a rate this is linear attention with decay (and the state space models Mamba and
    Mamba-2, whose ``C, B, dt x`` are query, key and value); with one, the gated delta rule.

    Args:
        query: ``[B, S, G, K]``, ``S >= 1``; each group serves ``H / G`` consecutive heads.
        key: ``[B, S, G, K]``.
        value: ``[B, S, H, V]``.
        log_decay: ``[B, S, H, K or 1]``, at most 0.
        rate: ``[B, S, H]`` or None.
        state: ``[B, H, K, V]``, before the first position.

    Returns:
        ``[B, S, H, V]``, and ``[B, H, K, V]`` after the last position.

    Source: Yang et al. 2024 (Gated Delta Networks), section 3.1; Dao and Gu 2024 (Mamba-2),
    section 2.
    """
    repeats = value.shape[2] // key.shape[2]
    query, key = (x.repeat_interleave(repeats, dim=2).unsqueeze(-2) for x in (query, key))
    value, decay = value.unsqueeze(-2), log_decay.exp().unsqueeze(-1)
    rows = []
    for position in range(value.shape[1]):
        row = key[:, position]
        state = decay[:, position] * state
        new = value[:, position]
        if rate is not None:
            new = rate[:, position, :, None, None] * (new - row @ state)
        state = state + row.transpose(-1, -2) * new
        rows.append(query[:, position] @ state)
    return torch.stack(rows, dim=1).squeeze(-2), state
