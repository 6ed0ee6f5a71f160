"""Convolution of each channel with its own past."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Position ``t`` of channel ``c`` is ``sum_j weight[c, j] x[c, t - K + 1 + j] + bias[c]``.

    What would stand before the first position is 0.

    Args:
        x: ``[B, C, T]``.
        weight: ``[C, K]``.
        bias: ``[C]`` or None.

    Returns:
        ``[B, C, T]``.
    """
    channels, width = weight.shape
    padded = functional.pad(x, (width - 1, 0))
    return functional.conv1d(padded, weight.unsqueeze(1), bias, groups=channels)
