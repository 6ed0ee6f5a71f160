"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first ``R`` channels of each head in ``R / 2`` planes; the others pass through.

    Plane ``j`` pairs channels ``(j, j + R/2)``, or ``(2j, 2j + 1)`` when `interleaved`:
    ``(a, b) -> (a cos_j - b sin_j, b cos_j + a sin_j)``.

    Args:
        x: ``[B, H, S, D]``.
        cos: ``[B or 1, S, R/2]``, one entry per plane, with any attention scaling applied.
        sin: The same shape.
        interleaved: Which channels form a plane.

    Returns:
        ``[B, H, S, D]``.

    Source: Su et al. 2021 (RoFormer), section 3.2.
    """
    half = cos.shape[-1]
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if interleaved:
        a, b = rotary[..., 0::2], rotary[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rotary[..., :half], rotary[..., half:]
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((rotated, rest), dim=-1)
