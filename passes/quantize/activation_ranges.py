"""Static grids of activations, from what calibration saw of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from qcompile.calibration.statistics import Histogram
from qcompile.passes.quantize.activation_formats import ActivationFormat, Grid

RangeMethod = Literal["absmax", "percentile", "mse"]
"""What a static scale spans: all that was seen, nearly all, or what loses least when rounded."""

RANGE_METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)

_SHRINK_STEPS = 80
"""Candidates of the search for the least error: 100 % to 21 % of the largest magnitude."""


def tensor_grid(
    seen: Histogram, format: ActivationFormat, method: RangeMethod, percentile: float
) -> Grid[Tensor]:
    """One grid for a whole tensor.

    Args:
        seen: What calibration saw.
        format: Of the codes.
        method: What the grid spans.
        percentile: For ``"percentile"``: the fraction of magnitudes that is not clipped.

    Returns:
        Scale ``[1]`` float32, 1 where only zeros were seen; zero point ``[1]`` or None.
    """
    find: dict[RangeMethod, Callable[[], float]] = {
        "absmax": partial(seen.percentile, 1.0),
        "percentile": partial(seen.percentile, percentile),
        "mse": partial(_least_error, seen, format),
    }
    return _grid_within(seen, format, find[method]())


def _grid_within(seen: Histogram, format: ActivationFormat, limit: float) -> Grid[Tensor]:
    """The grid of the values whose magnitude is at most `limit`."""
    ends = (max(seen.low, -limit), min(seen.high, limit))
    low, high = (torch.tensor([end], dtype=torch.float64) for end in ends)
    return format.grid(low, high)


def rounding_error(seen: Histogram, format: ActivationFormat, grid: Grid[Tensor]) -> float:
    """The squared error of rounding all that was seen; see `tensor_grid` for the grid."""
    values, counts = _values(seen)
    return float((counts * (values - format.round(values, grid)).square()).sum())


def _least_error(seen: Histogram, format: ActivationFormat) -> float:
    """The limit at which clipping and rounding together lose least (squared error)."""
    largest = seen.percentile(1.0)
    candidates = [largest * (1 - i / 100) for i in range(_SHRINK_STEPS)]

    def error(limit: float) -> float:
        return rounding_error(seen, format, _grid_within(seen, format, limit))

    return min(candidates, key=error) if largest else 0.0


def _values(seen: Histogram) -> tuple[Tensor, Tensor]:
    """What was seen but zeros, and how often, float64 each."""
    middles, _ = seen.magnitudes()
    values = torch.cat((middles, -middles))
    counts = torch.cat((seen.positive, seen.negative))
    return values[counts > 0], counts[counts > 0].to(torch.float64)
