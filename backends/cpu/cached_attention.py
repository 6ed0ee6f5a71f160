"""Attention over caches of few bits, in one node of the CPU library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.caches import CacheFormat
from qcompile.kernels.attention.reference import attention
from qcompile.kernels.kv_append.reference import kv_append
from qcompile.kernels.kv_append.rows import decode_rows, encode_rows
from qcompile.kernels.rope.reference import rope

_PAST_KEY, _PAST_VALUE = 3, 4
_FORMATS = slice(17, 21)


def cpu_cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    sinks: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    interleaved: bool,
    key_format: str,
    key_group_size: int,
    value_format: str,
    value_group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qc.cpu_attention` over caches that round what they are given.

    Args:
        query: As for `qc.cpu_attention`, like those up to `interleaved`.
        key: New keys.
        value: New values.
        past_key: ``[B, num_kv_heads, P, D]`` floats, or rows of bytes (see `qc.kv_encode`).
        past_value: ``[B, num_kv_heads, P, Dv]`` floats, or rows of bytes.
        key_mask: Which keys may be attended to.
        bias: Added to the scores.
        cos: To rotate by.
        sin: To rotate by.
        sinks: One per head.
        num_heads: Heads of the query.
        num_kv_heads: Heads of key and value.
        scale: Multiplies the scores.
        causal: Whether a query sees only positions up to its own.
        window: As for `qc.attention`.
        softcap: As for `qc.attention`.
        interleaved: Which channels a rotation pairs.
        key_format: Of the cache of keys, as for `qc.kv_append`.
        key_group_size: Likewise.
        value_format: Of the cache of values.
        value_group_size: Likewise.

    Returns:
        ``[B, S, num_heads * Dv]``, and both caches with the new positions, as they were given.
    """
    q, k, v = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, heads in ((query, num_heads), (key, num_kv_heads), (value, num_kv_heads))
    )
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)
    keys, kept_keys = _append(past_key, k, key_format, key_group_size)
    values, kept_values = _append(past_value, v, value_format, value_group_size)
    out = attention(q, keys, values, bias, key_mask, sinks, scale, causal, window, softcap)
    return out.transpose(1, 2).flatten(2).clone(), kept_keys, kept_values


def caches_of(node: fx.Node) -> Iterator[tuple[fx.Node, CacheFormat]]:
    """Both caches that a call of `cached_attention` takes, and their formats."""
    key_format, key_group, value_format, value_group = node.args[_FORMATS]
    for place, name, group in (
        (_PAST_KEY, key_format, key_group),
        (_PAST_VALUE, value_format, value_group),
    ):
        past = node.args[place]
        assert isinstance(past, fx.Node)
        assert isinstance(name, str)
        assert isinstance(group, int)
        yield past, CacheFormat(name, group)


def _append(past: Tensor, new: Tensor, format: str, group_size: int) -> tuple[Tensor, Tensor]:
    """All positions as attention reads them, and as the cache keeps them."""
    if past.dtype != torch.uint8:
        grown = kv_append(past, new, format, group_size)
        return grown, grown.clone()
    rows = torch.cat((past, encode_rows(new, format, group_size)), dim=2)
    return decode_rows(rows, format, group_size, new.shape[-1]).to(new.dtype), rows


def _shape(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    del key
    heads, kv_heads = rest[5], rest[6]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    batch, length = query.shape[:2]
    out = query.new_empty((batch, length, heads * (value.shape[2] // kv_heads)))
    grown = [
        past.new_empty((batch, kv_heads, past.shape[2] + length, past.shape[3]))
        for past in (past_key, past_value)
    ]
    return out, grown[0], grown[1]


cached_attention = dialect.define(cpu_cached_attention, shape=_shape, differentiable=False)
