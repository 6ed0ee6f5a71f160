"""How a weight's codes are packed for the `cuda` kernels: layout version 1.

A code of `bits` bits is stored in a container of 1, 2, 4 or 8 bits, the narrowest that holds it; a
byte holds ``8 / container`` codes. The columns of a weight ``[N, K]`` are cut into *blocks* of
``32 * 8 / container`` codes, and the packed weight is ``[blocks, N, 32]`` uint8: byte ``j`` of row
``n`` in block ``b`` holds, from its low bits up, the codes of columns

    32 * (b * parts + p) + j,    p = 0 ... parts - 1,    parts = 8 / container.

So a part is 32 consecutive columns: a tile of the kernel reads consecutive bytes, needs no shuffle
to unpack them, and meets one scale per row and part wherever groups are multiples of 32. Columns
beyond ``K`` in the last block hold code 0 and meet activations that are 0.

Scales and zero points stand beside it, transposed: ``[G, N]``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PART_COLUMNS = 32
"""Columns in a part of a block, and bytes per row in a block."""

_CONTAINERS = (1, 2, 4, 8)


def container_bits(bits: int) -> int:
    """Bits that a code takes in the packed weight.

    Args:
        bits: Of the codes, 1 to 8.

    Raises:
        ValueError: If `bits` is out of range.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return next(container for container in _CONTAINERS if container >= bits)


def packed_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed codes of a weight ``[n, k]``."""
    return -(-k // _block_columns(bits)), n, PART_COLUMNS


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs codes.

    Args:
        codes: ``[N, K]`` uint8, all below ``2 ** bits``.
        bits: Of the codes.

    Returns:
        ``[blocks, N, 32]`` uint8, contiguous.
    """
    container = container_bits(bits)
    n, k = codes.shape
    blocks = packed_shape(n, k, bits)[0]
    padded = functional.pad(codes, (0, blocks * _block_columns(bits) - k))
    parts = padded.reshape(n, blocks, 8 // container, PART_COLUMNS)
    packed = torch.zeros((n, blocks, PART_COLUMNS), dtype=torch.uint8, device=codes.device)
    for part in range(8 // container):
        packed |= parts[:, :, part] << (container * part)
    return packed.transpose(0, 1).contiguous()


def unpack_codes(packed: Tensor, k: int, bits: int) -> Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: ``[blocks, ..., 32]`` uint8: rows may be any selection, of any rank.
        k: Columns of the weight.
        bits: Of the codes.

    Returns:
        ``[..., k]`` uint8.
    """
    container = container_bits(bits)
    mask = 2**container - 1
    shifts = range(0, 8, container)
    parts = torch.stack([(packed >> shift) & mask for shift in shifts], dim=-2)
    return parts.movedim(0, -3).flatten(-3)[..., :k]


def _block_columns(bits: int) -> int:
    return PART_COLUMNS * 8 // container_bits(bits)
