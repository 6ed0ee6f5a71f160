"""`qc::quantized_linear` in Triton: unpack and dequantize a tile, multiply it on tensor cores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.quantize.groups import group_count
from qcompile.kernels.quantized_linear.layout import (
    PART_COLUMNS,
    container_bits,
    packed_shape,
)

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on any device: ``TRITON_INTERPRET=1``, once set
before this module is imported."""

_MAX_SPLITS = 8
_ENOUGH_PROGRAMS = 256
"""About two per multiprocessor of a large GPU: fewer leave memory bandwidth unused."""

_OPERANDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
_ROUNDINGS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Launch:
    """How the output is cut among programs.

    Attributes:
        block_m: Rows of a tile.
        block_n: Columns of a tile.
        splits: Parts of the sum over input features that are computed apart and added up after.
        warps: Of a program.
        stages: Depth of the software pipeline.
    """

    block_m: int
    block_n: int
    splits: int
    warps: int
    stages: int


def choose_launch(m: int, n: int, k: int, bits: int, operand: torch.dtype) -> Launch:
    """A launch for a problem; no measurement, no state.

    Up to 16 rows the time is that of reading the weight once: narrow tiles, and sums split until
    there are programs for all multiprocessors. Beyond, tiles grow with the rows, for reuse, as far
    as the registers of sm_80 go (float32 is multiplied in three pieces, and takes more of them).

    Args:
        m: Rows of the input.
        n: Output features.
        k: Input features.
        bits: Of the codes.
        operand: What is multiplied.
    """
    if m <= 16:
        blocks = packed_shape(n, k, bits)[0]
        tiles = triton.cdiv(n, 32)
        splits = max(1, min(_ENOUGH_PROGRAMS // tiles, _MAX_SPLITS, blocks // 8))
        return Launch(16, 32, splits, warps=2, stages=5)
    if operand == torch.float32:
        return Launch(32, 32, 1, warps=4, stages=3)
    if m <= 64:
        return Launch(triton.next_power_of_2(m), 64, 1, warps=4, stages=4)
    return Launch(64, 128, 1, warps=8, stages=3)


def quantized_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    k: int,
    bits: int,
    group_size: int,
    rounding: str,
) -> Tensor:
    """What the oracle of the same name computes, for activations of up to 32 bits.

    Arguments and result are those of
    `qcompile.kernels.quantized_linear.reference.quantized_linear`; all tensors are on one device.
    """
    rows = x.reshape(-1, k).contiguous()
    m, n, blocks = rows.shape[0], packed.shape[1], packed.shape[0]
    operand = _ROUNDINGS.get(rounding, x.dtype)
    launch = choose_launch(m, n, k, bits, operand)
    partial_dtype = x.dtype if launch.splits == 1 else torch.float32
    out = torch.empty((launch.splits, m, n), dtype=partial_dtype, device=x.device)
    if out.numel():
        grid = (triton.cdiv(m, launch.block_m) * triton.cdiv(n, launch.block_n), launch.splits)
        quantized_linear_kernel[grid](
            rows,
            packed,
            scale,
            zero_point,
            bias if launch.splits == 1 else None,
            out,
            m,
            n,
            k,
            blocks,
            **constants(k, bits, group_size, operand, launch, saturate=operand != x.dtype),
            num_warps=launch.warps,
            num_stages=launch.stages,
        )
    if launch.splits == 1:
        return out[0].reshape(*x.shape[:-1], n)
    total = out.sum(0)
    if bias is not None:
        total += bias
    return total.to(x.dtype).reshape(*x.shape[:-1], n)


def constants(
    k: int, bits: int, group_size: int, operand: torch.dtype, launch: Launch, *, saturate: bool
) -> dict[str, object]:
    """The compile-time arguments of `quantized_linear_kernel`.

    Args:
        k: Input features.
        bits: Of the codes.
        group_size: Input features per scale; 0 is one group.
        operand: What is multiplied.
        launch: The tiles.
        saturate: Whether activations may exceed the range of `operand`.
    """
    return {
        "BITS": bits,
        "CONTAINER": container_bits(bits),
        "PART": PART_COLUMNS,
        # One group over everything is a group that never ends.
        "GROUP_SIZE": group_size or PART_COLUMNS * triton.cdiv(k, PART_COLUMNS),
        "GROUPS": group_count(k, group_size),
        "OPERAND": _OPERANDS[operand],
        # The interpreter computes with NumPy, which has no bfloat16.
        "PRODUCT": _OPERANDS[torch.float32 if INTERPRETED else operand],
        "LARGEST": torch.finfo(operand).max if saturate else 0.0,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "SPLITS": launch.splits,
    }


@triton.jit  # type: ignore[untyped-decorator]
def quantized_linear_kernel(  # type: ignore[no-untyped-def]
    x,  # [m, k], contiguous
    packed,  # [blocks, n, PART] uint8
    scale,  # [GROUPS, n]
    zero_point,  # [GROUPS, n] uint8, float16 or None
    bias,  # [n] or None
    out,  # [SPLITS, m, n]
    m,
    n,
    k,
    blocks,
    BITS: tl.constexpr,
    CONTAINER: tl.constexpr,
    PART: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRODUCT: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One tile of the output, or of one part of its sum."""
    PARTS: tl.constexpr = 8 // CONTAINER
    # Neighbours in time share columns, so that a tile of the weight is read from cache.
    tile_rows = tl.cdiv(m, BLOCK_M)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = (tile % tile_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile // tile_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, PART)
    row_in = rows < m
    column_in = columns < n

    share = tl.cdiv(blocks, SPLITS)
    first_block = split * share
    last_block = tl.minimum(first_block + share, blocks)
    x_rows = x + rows[:, None].to(tl.int64) * k
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(first_block, last_block):
        # Rows of 32 bytes are counted in 32 bits, bytes in 64.
        start = (block * n + columns).to(tl.int64)[None, :] * PART
        stored = tl.load(packed + start + lane[:, None], mask=column_in[None, :], other=0)
        for part in tl.static_range(PARTS):
            first = (block * PARTS + part) * PART
            index = first + lane
            a = tl.load(x_rows + index[None, :], mask=row_in[:, None] & (index < k), other=0.0)
            if LARGEST > 0.0:
                a = tl.clamp(a.to(tl.float32), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
            codes = (stored >> (CONTAINER * part)) & ((1 << CONTAINER) - 1)
            if GROUP_SIZE % PART == 0:
                group = tl.minimum(first // GROUP_SIZE, GROUPS - 1)
                place = (group * n + columns)[None, :]
                known = column_in[None, :]
            else:
                group = tl.minimum(index // GROUP_SIZE, GROUPS - 1)
                place = group[:, None] * n + columns[None, :]
                known = column_in[None, :] & (index >= 0)[:, None]
            step = tl.load(scale + place, mask=known, other=0.0).to(tl.float32)
            if zero_point is None:
                levels = codes.to(tl.float32) - (1 << (BITS - 1))
            else:
                zero = tl.load(zero_point + place, mask=known, other=0)
                levels = codes.to(tl.float32) - zero.to(tl.float32)
            a = a.to(OPERAND).to(PRODUCT)
            b = (levels * step).to(OPERAND).to(PRODUCT)
            total = tl.dot(a, b, total, input_precision="tf32x3")
    if bias is not None:
        total += tl.load(bias + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    place = out + (split * m + rows[:, None]).to(tl.int64) * n + columns[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])
