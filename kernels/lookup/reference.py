"""The oracle of `qc::lookup`."""

from typing import Optional

import torch
from torch import Tensor

from qcompile.kernels.lookup.levels import levels as table_of
from qcompile.kernels.quantize.groups import spread_groups

# Eager annotations and `Optional`, as in `kernels/quantize/reference.py`.


def lookup(codes: Tensor, scale: Optional[Tensor], levels: str, group_size: int) -> Tensor:
    """Values of codes: levels[code] * scale, one product that is rounded to float32.

    Args:
        codes: [..., K] uint8, below the number of levels.
        scale: [..., G] or [..., 1] floating, broadcast over the leading dimensions of `codes`;
            None means 1.
        levels: Name or numbers of a table; see `qcompile.kernels.lookup.levels`.
        group_size: Elements per scale along K; 0 means one scale.

    Returns:
        [..., K] float32, or float64 when `scale` is. The values are those of float32 in any case:
        that rounding of the product is part of what a weight decodes to, on every target and in
        every check.
    """
    table = torch.tensor(table_of(levels), dtype=torch.float32, device=codes.device)
    values = look_up(codes, scale, table, group_size)
    return values if scale is None or scale.dtype != torch.float64 else values.to(torch.float64)


def look_up(codes: Tensor, scale: Optional[Tensor], table: Tensor, group_size: int) -> Tensor:
    """`lookup` in a table that is a tensor, [L] float32."""
    values = table.index_select(0, codes.flatten().to(torch.int32)).reshape(codes.shape)
    if scale is None:
        return values
    return values * spread_groups(scale.to(torch.float32), codes.shape[-1], group_size)
