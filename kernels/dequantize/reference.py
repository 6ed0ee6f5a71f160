"""The oracle of `qc::dequantize`."""

from typing import Optional

import torch
from torch import Tensor

from qcompile.kernels.quantize.groups import spread_groups

# Eager annotations and `Optional`, as in `kernels/quantize/reference.py`.


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],
    bits: int,
    group_size: int,
) -> Tensor:
    """Values of integer codes: (code - zero_point) * scale.

    Args:
        codes: [..., K]. uint8 codes (weights, asymmetric activations) stand for
            code - zero_point; int8 codes (symmetric activations) stand for themselves.
        scale: [..., G] float16, bfloat16, float32 or float64, broadcast over the leading
            dimensions of `codes`.
        zero_point: Code of the value 0, same shape as `scale`; None means 2^(bits-1) for uint8
            codes and 0 for int8 codes.
        bits: Width of the codes, 1 to 8.
        group_size: Elements per group along K; 0 means one group.

    Returns:
        [..., K] float32, or float64 when `scale` is.
    """
    size = codes.shape[-1]
    dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
    steps = codes.to(dtype)
    if zero_point is not None:
        steps = steps - spread_groups(zero_point, size, group_size).to(dtype)
    elif codes.dtype == torch.uint8:
        steps = steps - 2 ** (bits - 1)
    return steps * spread_groups(scale.to(dtype), size, group_size)
