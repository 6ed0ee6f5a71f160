"""Growing a key or value cache, and what a cache of few bits keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.kv_append.rows import FLOAT_CACHE, decode_rows, encode_rows


def kv_append(past: Tensor, new: Tensor, format: str = "float", group_size: int = 0) -> Tensor:
    """Appends the new positions to a cache; a target is free to do it in place.

    Args:
        past: ``[B, H, P, D]``, ``P >= 0``.
        new: ``[B, H, S, D]``.
        format: ``"float"``, or what the cache keeps of each position: one of `CACHE_FORMATS`. New
            positions are rounded to it; the past was, when it was new. No gradient passes.
        group_size: Numbers per scale along ``D``; 0 is one scale per head and position.

    Returns:
        ``[B, H, P + S, D]``, in the dtype of `new`.
    """
    if format != FLOAT_CACHE:
        rows = encode_rows(new.detach(), format, group_size)
        new = decode_rows(rows, format, group_size, new.shape[-1]).to(new.dtype)
    return torch.cat((past, new), dim=2)


def kv_encode(x: Tensor, format: str, group_size: int) -> Tensor:
    """Positions as a cache of few bits stores them.

    Args:
        x: ``[B, H, S, D]``.
        format: One of `CACHE_FORMATS`.
        group_size: As for `kv_append`.

    Returns:
        ``[B, H, S, row_bytes(D)]`` uint8, see `qcompile.kernels.kv_append.rows`.
    """
    return encode_rows(x, format, group_size)


def kv_decode(rows: Tensor, format: str, group_size: int, width: int) -> Tensor:
    """The positions that a cache of few bits holds.

    Args:
        rows: ``[B, H, T, row_bytes(width)]`` uint8.
        format: One of `CACHE_FORMATS`.
        group_size: As for `kv_append`.
        width: ``D``.

    Returns:
        ``[B, H, T, D]`` float32.
    """
    return decode_rows(rows, format, group_size, width)
