"""Layer normalization over the last axis."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last axis.

    Args:
        x: ``[..., D]``, floating.
        weight: Gain ``[D]`` or None.
        bias: Shift ``[D]`` or None.
        eps: Added to the biased variance.

    Returns:
        ``[..., D]`` in the dtype of `x`.

    Source: Ba, Kiros and Hinton 2016, section 3.
    """
    centred = x - x.mean(-1, keepdim=True)
    normalized = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        normalized = normalized * weight
    return normalized if bias is None else normalized + bias
