"""Static scales of activations, from what calibration saw of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from qcompile.calibration.statistics import ChannelRange, Histogram

RangeMethod = Literal["absmax", "percentile", "mse"]
"""What a static scale spans: all that was seen, nearly all, or what loses least when rounded."""

RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

_SHRINK_STEPS = 80
"""Candidates of the search for the least error: 100 % to 21 % of the largest magnitude."""


def tensor_scale(seen: Histogram, bits: int, method: RangeMethod, percentile: float) -> Tensor:
    """One symmetric scale for a whole tensor.

    Args:
        seen: Magnitudes that calibration saw.
        bits: Width of the codes.
        method: What the scale spans.
        percentile: For ``"percentile"``: the fraction of values that is not clipped.

    Returns:
        ``[1]`` float32; 1 where only zeros were seen.
    """
    largest_code = 2 ** (bits - 1) - 1
    find: dict[RangeMethod, Callable[[], float]] = {
        "absmax": partial(seen.percentile, 1.0),
        "percentile": partial(seen.percentile, percentile),
        "mse": partial(_least_error, seen, largest_code),
    }
    limit = find[method]()
    return torch.tensor([limit / largest_code if limit else 1.0], dtype=torch.float32)


def channel_scales(seen: ChannelRange, bits: int) -> Tensor:
    """One symmetric scale per channel that clips nothing that was seen: ``[K]`` float32."""
    scale = seen.absmax / (2 ** (bits - 1) - 1)
    return torch.where(scale == 0, torch.ones_like(scale), scale).to(torch.float32)


def _least_error(seen: Histogram, largest_code: int) -> float:
    """The limit at which clipping and rounding together lose least (squared error)."""
    magnitudes, counts = seen.magnitudes()
    used = counts > 0
    magnitudes, counts = magnitudes[used], counts[used].to(torch.float64)
    largest = seen.percentile(1.0)
    candidates = [largest * (1 - i / 100) for i in range(_SHRINK_STEPS)]

    def error(limit: float) -> float:
        scale = limit / largest_code
        rounded = (magnitudes / scale).round().clamp(max=largest_code) * scale
        return float((counts * (magnitudes - rounded).square()).sum())

    return min(candidates, key=error) if largest else 0.0
