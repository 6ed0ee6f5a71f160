"""The operators that opset 23 has for language models, where their definition is the program's.

`RMSNormalization`, `RotaryEmbedding` and `Attention` spare a toolchain the recognition of their
parts. What they cannot say stays in elementary operators: attention sinks, and soft-capped scores
(opset 23 caps after masking, which lets masked positions through).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.backends.onnx import dialect as elementary
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table, Translation
from qcompile.backends.onnx.values import same_size
from qcompile.ir import dialect

FIRST_OPSET = 23
"""The version that introduced these operators."""

_TABLE = Table()

_BOOL = ir.DataType.BOOL
_LOWEST = -1e38
"""Added to scores that are not allowed. Finite, so that a row without any allowed score stays a
number; below every score by more than float32 can tell, so that its weight is 0 in all others."""


@_TABLE.register(dialect.rms_norm)
def _rms_norm(b: Builder, x: ir.Value, weight: ir.Value | None, eps: float) -> ir.Value:
    if weight is None:
        weight = b.constant(np.ones(int(b.shape(x)[-1])), x.dtype or b.dtype)
    return b.op("RMSNormalization", x, weight, axis=-1, epsilon=float(eps))


@_TABLE.register(dialect.rope)
def _rope(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, interleaved: bool) -> ir.Value:
    batch, _, length, width = b.shape(x)
    half = int(b.shape(cos)[-1])
    tables = [b.expand(table, (batch, length, half), b.dtype) for table in (cos, sin)]
    rotary = 2 * half if 2 * half < int(width) else 0
    return b.op(
        "RotaryEmbedding", x, *tables, interleaved=int(interleaved), rotary_embedding_dim=rotary
    )


@_TABLE.register(dialect.attention)
def _attention(
    b: Builder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    mask: ir.Value | None,
    key_mask: ir.Value | None,
    sinks: ir.Value | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> ir.Value:
    same_width = same_size(b.shape(query)[-1], b.shape(value)[-1])
    if sinks is not None or softcap > 0 or not same_width:
        operands = (query, key, value, mask, key_mask, sinks)
        return elementary.attention(b, *operands, scale, causal, window, softcap)
    bias = _bias(b, query, key, mask, key_mask, causal, window)
    return b.op("Attention", query, key, value, bias, scale=float(scale))


def _bias(
    b: Builder,
    query: ir.Value,
    key: ir.Value,
    mask: ir.Value | None,
    key_mask: ir.Value | None,
    causal: bool,
    window: int,
) -> ir.Value | None:
    """What is added to scores, ``[B or 1, Hq or 1, S, T]``; layers that agree share it."""
    if mask is None and key_mask is None and not causal and window <= 0:
        return None
    queries = b.axis_size(query, 2)

    def make() -> ir.Value:
        is_additive = mask is not None and mask.dtype != _BOOL
        boolean = None if is_additive else mask
        allowed = elementary.allowed_pairs(b, query, key, boolean, key_mask, causal, window)
        lowest = b.constant(_LOWEST, b.dtype)
        bias = None if allowed is None else b.op("Where", allowed, b.constant(0.0, b.dtype), lowest)
        if mask is not None and is_additive:
            additive = b.cast(mask, b.dtype)
            total = additive if bias is None else b.op("Add", bias, additive)
            bias = b.op("Max", total, lowest)
        assert bias is not None
        # Of rank 4 and with a row for every query, even where all see the same.
        return b.op("Expand", bias, [1, 1, queries, 1])

    sizes = (b.shape(query)[2], b.shape(key)[2])
    return b.once(("attention bias", *map(str, sizes), mask, key_mask, causal, window), make)


TRANSLATIONS: Mapping[Any, Translation] = MappingProxyType(_TABLE)
"""To be put before those of the dialect, from `FIRST_OPSET` on."""
