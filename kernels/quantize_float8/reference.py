"""The oracles of `qc::float8_scale` and `qc::quantize_float8`.

Their codes are decoded by `qc::lookup`, in the table of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qcompile.kernels.quantize.groups import at_least_float32, covering_scale, spread_groups

FLOAT8_TYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
)
"""Tables of levels that are 8-bit floats, and torch's types of the same codes."""


def float8_scale(x: Tensor, levels: str, group_size: int) -> Tensor:
    """Scale of each group of activations, measured at run time: no value is clipped.

    Args:
        x: Activations [..., K], any float dtype.
        levels: One of `FLOAT8_TYPES`.
        group_size: Elements per group along K; 0 means one group (a scale per token).

    Returns:
        max|x| / the largest level, of each group: [..., G], float32 (float64 for float64 input);
        1 where that is 0. Not finite where the group is not.
    """
    return covering_scale(x, largest_float8(levels), group_size)


def quantize_float8(x: Tensor, scale: Tensor, levels: str, group_size: int) -> Tensor:
    """Rounds values to 8-bit floats, half to even, saturating.

    Args:
        x: Values [..., K], any float dtype.
        scale: [..., G], broadcast over the leading dimensions of `x` (a static activation scale
            is [1] or [G]).
        levels: One of `FLOAT8_TYPES`.
        group_size: Elements per group along K; 0 means one group.

    Returns:
        The codes of x / scale, a true division that is rounded to float32 first, [..., K] uint8.
        What lies beyond the largest level, infinities included, becomes that; a value that is not
        a number gets a code that is none either.
    """
    wide = at_least_float32(x)
    ratio = wide / spread_groups(at_least_float32(scale), x.shape[-1], group_size)
    largest = largest_float8(levels)
    narrow = ratio.to(torch.float32).clamp(-largest, largest).to(FLOAT8_TYPES[levels])
    return narrow.view(torch.uint8)


def largest_float8(levels: str) -> float:
    """The largest level of one of `FLOAT8_TYPES`.

    Raises:
        ValueError: If it is none of them.
    """
    if levels not in FLOAT8_TYPES:
        raise ValueError(f"'{levels}' are no 8-bit floats: {', '.join(FLOAT8_TYPES)}")
    return torch.finfo(FLOAT8_TYPES[levels]).max
