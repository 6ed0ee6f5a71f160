"""The oracles of `qc::float_scale` and `qc::quantize_float`.

Their codes are decoded by `qc::lookup`, in the table of the same name.
"""

from __future__ import annotations

from math import isfinite, isnan

import torch
from torch import Tensor

from qcompile.kernels.lookup.levels import FloatFields, float_fields
from qcompile.kernels.lookup.levels import levels as table_of
from qcompile.kernels.quantize.groups import at_least_float32, covering_scale, spread_groups


def float_scale(x: Tensor, levels: str, group_size: int) -> Tensor:
    """Scale of each group of activations, measured at run time: no value is clipped.

    Args:
        x: Activations [..., K], any float dtype.
        levels: A table of small floats, ``"e2m1"`` or ``"e4m3"``.
        group_size: Elements per group along K; 0 means one group (a scale per token).

    Returns:
        max|x| / the largest level, of each group: [..., G], float32 (float64 for float64 input);
        1 where that is 0. Not finite where the group is not.
    """
    return covering_scale(x, largest_level(levels), group_size)


def quantize_float(x: Tensor, scale: Tensor, levels: str, group_size: int) -> Tensor:
    """Rounds values to small floats, saturating.

    The nearest number with as many bits of mantissa in the value's own binade, half to even: for
    floats without a mantissa, whose numbers are powers of two, what lies halfway goes up.

    Args:
        x: Values [..., K], any float dtype.
        scale: [..., G], broadcast over the leading dimensions of `x` (a static activation scale
            is [1] or [G]).
        levels: A table of small floats.
        group_size: Elements per group along K; 0 means one group.

    Returns:
        The codes of x / scale, a true division that is rounded to float32 first, [..., K] uint8.
        What lies beyond the largest level, infinities included, becomes that; a value that is not
        a number gets a code that is none either where the table has one, else the code of 0.
    """
    fields = _fields(levels)
    wide = at_least_float32(x)
    spread = spread_groups(at_least_float32(scale), x.shape[-1], group_size)
    ratio = (wide / spread).to(torch.float32)
    magnitude = ratio.abs().clamp(max=largest_level(levels))
    binade = torch.frexp(magnitude.clamp(min=2.0**fields.least_exponent)).exponent - 1
    steps = torch.round(torch.ldexp(magnitude, fields.mantissa_bits - binade))
    # The next binade's codes go on where a binade's end, so that rounding up across needs no care.
    codes = steps + (binade - fields.least_exponent) * 2**fields.mantissa_bits
    signs = torch.signbit(ratio) * 2 ** (fields.exponent_bits + fields.mantissa_bits)
    none = next((code for code, value in enumerate(table_of(levels)) if isnan(value)), 0)
    return torch.where(ratio.isnan(), none, codes + signs).to(torch.uint8)


def largest_level(levels: str) -> float:
    """The largest number of a table of small floats.

    Raises:
        ValueError: If it is none.
    """
    _fields(levels)
    return max(value for value in table_of(levels) if isfinite(value))


def _fields(levels: str) -> FloatFields:
    fields = float_fields(levels)
    if fields is None:
        raise ValueError(f"'{levels}' are no small floats, such as e2m1 or e4m3")
    return fields
