"""The oracles of `qc::dynamic_scale` and `qc::quantize`.

Plain torch, differentiable nowhere (codes are integers), and free of branches on leading
dimensions, which may be symbolic; the last dimension is static.
"""

from typing import Optional

import torch
from torch import Tensor

from qcompile.kernels.quantize.groups import at_least_float32, covering_scale, spread_groups

# `torch.library.infer_schema` evaluates these annotations on every supported Python, so this
# module keeps them eager and spells the optional operand as `Optional`.


def dynamic_scale(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Symmetric scale of each group of activations, measured at run time.

    Args:
        x: Activations [..., K], any float dtype.
        bits: Width of the codes that will use the scale, 2 to 8.
        group_size: Elements per group along K; 0 means one group (a scale per token).

    Returns:
        max|x| / (2^(bits-1) - 1) of each group, [..., G], float32 (float64 for float64 input);
        1 where that is 0. Not finite where the group is not.
    """
    return covering_scale(x, _largest_code(bits), group_size)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],
    bits: int,
    group_size: int,
) -> Tensor:
    """Rounds values to integer codes, half to even, by true division.

    Args:
        x: Values [..., K], any float dtype.
        scale: [..., G], broadcast over the leading dimensions of `x` (a static activation scale
            is [1] or [G]).
        zero_point: Code of the value 0, same shape as `scale`; None for symmetric codes.
        bits: Width of the codes, 1 to 8; at least 2 for symmetric codes.
        group_size: Elements per group along K; 0 means one group.

    Returns:
        Without a zero point int8 codes clamp(round(x / scale), -q, q), q = 2^(bits-1) - 1; with
        one uint8 codes clamp(round(x / scale) + zero_point, 0, 2^bits - 1). [..., K]. A value
        that is not a number gets the code of 0.
    """
    size = x.shape[-1]
    ratio = at_least_float32(x) / spread_groups(at_least_float32(scale), size, group_size)
    steps = torch.nan_to_num(torch.round(ratio), nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if zero_point is None:
        largest = _largest_code(bits)
        return torch.clamp(steps, -largest, largest).to(torch.int8)
    offset = spread_groups(zero_point, size, group_size).to(steps.dtype)
    return torch.clamp(steps + offset, 0, 2**bits - 1).to(torch.uint8)


def _largest_code(bits: int) -> int:
    if not 2 <= bits <= 8:
        raise ValueError(f"symmetric codes have 2 to 8 bits, not {bits}")
    return int(2 ** (bits - 1) - 1)
