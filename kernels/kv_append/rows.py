"""Key/value caches as bytes: one row for each position of a head.

A row of `width` numbers holds

- ``float``: the numbers as float32; ``bf16``: as bfloat16;
- ``int8``: one code each; ``int4``: two codes to a byte, the first half of the row in the low
  nibbles and the second half in the high ones. Behind the codes stand the scales of the groups as
  float16, and then their zero points, one byte each.

Groups are asymmetric and chosen for each row by itself, as in KIVI (arXiv:2402.02750) for values
and in QuaRot (arXiv:2404.00456) for both: they span 0 and all numbers of the group. All numbers are
little-endian.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.groups import group_count, split_groups
from qcompile.kernels.quantize.reference import quantize

FLOAT_CACHE = "float"
"""The format of a cache that holds keys and values as they are computed."""

_PLAIN = {FLOAT_CACHE: torch.float32, "bf16": torch.bfloat16}
_BITS = {"int8": 8, "int4": 4}

CACHE_FORMATS = ("bf16", *_BITS)
"""Formats of caches that round, by name. `FLOAT_CACHE` stands in rows only beside one of them."""

_SCALE_BYTES = 2  # of float16


def row_bytes(width: int, format: str, group_size: int) -> int:
    """Bytes of one row.

    Args:
        width: Numbers in it.
        format: ``"float"``, or one of `CACHE_FORMATS`.
        group_size: Numbers per scale; 0 is one scale for all.

    Raises:
        ValueError: There is no such format.
    """
    if format in _PLAIN:
        return _PLAIN[format].itemsize * width
    bits = _bits(format)
    return code_bytes(width, bits) + group_count(width, group_size) * (_SCALE_BYTES + 1)


def code_bytes(width: int, bits: int) -> int:
    """Bytes of the codes of a row."""
    return width if bits == 8 else -(-width // 2)


def encode_rows(x: Tensor, format: str, group_size: int) -> Tensor:
    """Numbers as rows of bytes.

    Args:
        x: ``[..., width]``, any float dtype; rounded from float32.
        format: ``"float"``, or one of `CACHE_FORMATS`.
        group_size: Numbers per scale; 0 is one scale for all.

    Returns:
        ``[..., row_bytes]`` uint8. In the integer formats, a number that is not finite, or of a
        range that no float16 scale spans (2^16 times the codes), leaves its group not finite.
    """
    x = x.to(torch.float32)
    if format in _PLAIN:
        return x.to(_PLAIN[format]).contiguous().view(torch.uint8)
    bits = _bits(format)
    scale, zero_point = _grid(x, bits, group_size)
    codes = quantize(x, scale, zero_point, bits, group_size)
    parts = [_pack(codes, bits), scale.contiguous().view(torch.uint8), zero_point]
    return torch.cat(parts, dim=-1)


def decode_rows(rows: Tensor, format: str, group_size: int, width: int) -> Tensor:
    """The numbers that rows stand for.

    Args:
        rows: ``[..., row_bytes]`` uint8.
        format: ``"float"``, or one of `CACHE_FORMATS`.
        group_size: Numbers per scale; 0 is one scale for all.
        width: Numbers in a row.

    Returns:
        ``[..., width]`` float32.
    """
    if format in _PLAIN:
        return rows.contiguous().view(_PLAIN[format]).to(torch.float32)
    bits, groups = _bits(format), group_count(width, group_size)
    sizes = [code_bytes(width, bits), groups * _SCALE_BYTES, groups]
    packed, scale, zero_point = rows.split(sizes, dim=-1)
    codes = _unpack(packed, bits, width)
    halves = scale.contiguous().view(torch.float16)
    return dequantize(codes, halves, zero_point, bits, group_size)


def _grid(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale (float16) and zero point (uint8) of each group, ``[..., G]``."""
    groups = split_groups(x, group_size)
    least, most = groups.amin(dim=-1).clamp(max=0.0), groups.amax(dim=-1).clamp(min=0.0)
    last = 2**bits - 1
    scale = ((most - least) / last).to(torch.float16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = torch.round(-least / scale.to(torch.float32)).nan_to_num(nan=0.0)
    return scale, zero_point.clamp(0, last).to(torch.uint8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    width = codes.shape[-1]
    low, high = codes.split([code_bytes(width, bits), width // 2], dim=-1)
    if width % 2:
        high = torch.nn.functional.pad(high, (0, 1))
    packed: Tensor = low | (high << 4)
    return packed


def _unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    if bits == 8:
        return packed
    return torch.cat((packed & 0xF, packed >> 4), dim=-1)[..., :width]


def _bits(format: str) -> int:
    if format not in _BITS:
        known = ", ".join(CACHE_FORMATS)
        raise ValueError(f"unknown cache format '{format}'; known: {known}")
    return _BITS[format]
