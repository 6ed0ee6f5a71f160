"""The oracles of `qc::quantized_linear` and `qc::quantized_embedding`."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantized_linear.layout import unpack_codes

ROUNDINGS: dict[str, torch.dtype | None] = {
    "none": None,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""What both operands of a product may be rounded to first."""


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],
    bias: Optional[Tensor],
    k: int,
    bits: int,
    group_size: int,
    rounding: str,
) -> Tensor:
    """``x @ dequantize(codes).T + bias``, summed in float32.

    Args:
        x: ``[..., k]`` float16, bfloat16 or float32 (float64 computes in float64).
        packed: Codes in the layout of `qcompile.kernels.quantized_linear.layout`,
            ``[blocks, N, 32]`` uint8.
        scale: ``[G, N]`` floating.
        zero_point: ``[G, N]`` uint8 or float16, or None: ``2 ** (bits - 1)`` everywhere.
        bias: ``[N]``, or None.
        k: Input features.
        bits: Of the codes, 1 to 8.
        group_size: Input features per scale; 0 is one group. The last group may be short.
        rounding: One of `ROUNDINGS`: what both operands are rounded to before they are
            multiplied, so that tensor cores multiply them. Activations out of its range become its
            largest value. ``"none"`` rounds the weight to the type of `x`.

    Returns:
        ``[..., N]`` in the dtype of `x`.
    """
    weight = _weight_rows(packed, scale, zero_point, k, bits, group_size)
    a, b = _rounded(x, rounding), _rounded(weight.to(x.dtype), rounding)
    if x.dtype != torch.float64:
        a, b = a.float(), b.float()
    y = torch.nn.functional.linear(a, b, None if bias is None else bias.to(a.dtype))
    return y.to(x.dtype)


def quantized_embedding(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],
    k: int,
    bits: int,
    group_size: int,
) -> Tensor:
    """Rows of a packed table, decoded.

    Args:
        ids: ``[...]`` integers.
        packed: As for `quantized_linear`.
        scale: As for `quantized_linear`.
        zero_point: As for `quantized_linear`.
        k: Width of a row.
        bits: Of the codes.
        group_size: Columns per scale; 0 is one group.

    Returns:
        ``[..., k]`` float32 (float64 if `scale` is).
    """
    rows = None if zero_point is None else zero_point[:, ids]
    return _weight_rows(packed[:, ids], scale[:, ids], rows, k, bits, group_size)


def _weight_rows(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, bits: int, group_size: int
) -> Tensor:
    """``[..., k]`` values of the rows ``...``, which stand between the other axes."""
    return dequantize(
        unpack_codes(packed, k, bits),
        scale.movedim(0, -1),
        None if zero_point is None else zero_point.movedim(0, -1),
        bits,
        group_size,
    )


def _rounded(x: Tensor, rounding: str) -> Tensor:
    dtype = ROUNDINGS[rounding]
    if dtype is None:
        return x
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).to(x.dtype)
