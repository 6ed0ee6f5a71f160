"""The oracle of `qc::dequantize`."""

from collections.abc import Callable
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
        zero_point: Code of the value 0, same shape as `scale`; or float16, and between codes; None
            means 2^(bits-1) for uint8 codes and 0 for int8 codes.
        bits: Width of the codes, 1 to 8.
        group_size: Elements per group along K; 0 means one group.

    Returns:
        [..., K] float32, or float64 when `scale` is. Of uint8 codes the values are those of float32
        in any case: that rounding of the product is part of what a weight decodes to, on every
        target and in every check.
    """
    if codes.dtype == torch.uint8 and scale.dtype == torch.float64:
        rounded = dequantize(codes, scale.to(torch.float32), zero_point, bits, group_size)
        return rounded.to(torch.float64)
    size = codes.shape[-1]
    dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
    steps = codes.to(dtype)
    scale = scale.to(dtype)
    if group_size and scale.shape[-1] * group_size == size:
        # Whole groups: broadcasting spares a copy of the scales at the size of the codes.
        grouped = steps.unflatten(-1, (-1, group_size))
        steps = _steps(grouped, codes, zero_point, bits, lambda z: z.unsqueeze(-1))
        return _times(steps, scale.unsqueeze(-1)).flatten(-2)
    steps = _steps(steps, codes, zero_point, bits, lambda z: spread_groups(z, size, group_size))
    return _times(steps, spread_groups(scale, size, group_size))


def _steps(
    steps: Tensor,
    codes: Tensor,
    zero_point: Tensor | None,
    bits: int,
    spread: Callable[[Tensor], Tensor],
) -> Tensor:
    """How many scales each code stands for; `steps` are the codes as fresh floats."""
    if zero_point is not None:
        return steps.sub_(spread(zero_point).to(steps.dtype))
    return steps.sub_(2 ** (bits - 1)) if codes.dtype == torch.uint8 else steps


def _times(steps: Tensor, scale: Tensor) -> Tensor:
    """The product, in the memory of `steps` unless a derivative will need them."""
    return steps * scale if scale.requires_grad else steps.mul_(scale)
