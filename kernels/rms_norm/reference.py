"""Root-mean-square normalization."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Optional[Tensor], eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis.

    Args:
        x: ``[..., D]``, floating.
        weight: Gain ``[D]``, or None for the bare core.
        eps: Added to the mean square.

    Returns:
        ``[..., D]`` in the dtype of `x`.

    Source: Zhang and Sennrich 2019, equation 4.
    """
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normalized if weight is None else normalized * weight
