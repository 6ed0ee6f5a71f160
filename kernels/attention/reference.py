"""Scaled dot-product attention with grouped heads and the masks that language models use."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],
    key_mask: Optional[Tensor],
    sinks: Optional[Tensor],
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    """``softmax(cap(scale * Q K^T) + masks) V``, queries grouped over fewer key heads.

    The ``S`` queries are the *last* ``S`` of the ``T`` positions, so query ``i`` stands at
    position ``T - S + i``. Queries that may attend to nothing give zeros.

    Args:
        query: ``[B, Hq, S, D]``.
        key: ``[B, Hkv, T, D]``, ``Hq`` a multiple of ``Hkv``.
        value: ``[B, Hkv, T, Dv]``.
        mask: Boolean (True attends) or additive, broadcastable to ``[B, Hq, S, T]``; or None.
        key_mask: ``[B, T]``, nonzero where a key may be attended to; or None.
        sinks: ``[Hq]`` logits that join each row's softmax without a value; or None.
        scale: Multiplies the scores.
        causal: Whether a query sees only positions up to its own.
        window: A query sees only the last `window` positions, its own included; 0 is no limit.
        softcap: Scores become ``softcap * tanh(score / softcap)`` before masking; 0 is off.

    Returns:
        ``[B, Hq, S, Dv]``.

    Source: Vaswani et al. 2017, section 3.2; Ainslie et al. 2023 for grouped queries.
    """
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    allowed = _allowed(scores, mask, key_mask, causal, window)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1).nan_to_num(0.0)
    return weights @ value


def _allowed(
    scores: Tensor, mask: Tensor | None, key_mask: Tensor | None, causal: bool, window: int
) -> Tensor | None:
    """Which (query, key) pairs may meet, or None when all may."""
    queries, keys = scores.shape[-2:]
    position = torch.arange(keys - queries, keys, device=scores.device).unsqueeze(-1)
    key_position = torch.arange(keys, device=scores.device)
    terms: list[Tensor] = []
    if mask is not None and mask.dtype == torch.bool:
        terms.append(mask)
    if key_mask is not None:
        terms.append((key_mask != 0)[:, None, None, :])
    if causal:
        terms.append(key_position <= position)
    if window > 0:
        terms.append(key_position > position - window)
    allowed: Tensor | None = None
    for term in terms:
        allowed = term if allowed is None else allowed & term
    return allowed
