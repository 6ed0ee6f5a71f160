"""Growing a key or value cache."""

from __future__ import annotations

import torch
from torch import Tensor


def kv_append(past: Tensor, new: Tensor) -> Tensor:
    """Appends the new positions to a cache; a target is free to do it in place.

    Args:
        past: ``[B, H, P, D]``, ``P >= 0``.
        new: ``[B, H, S, D]``.

    Returns:
        ``[B, H, P + S, D]``.
    """
    return torch.cat((past, new), dim=2)
