"""The operators of the CPU library, as the lowered program names them.

Each reference below says in terms of the dialect what one node of ``com.qcompile`` computes, so
that a lowered program can be interpreted and compared with the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompile.backends.cpu.activations import IntegerActivations
from qcompile.ir import dialect
from qcompile.kernels.attention.reference import attention
from qcompile.kernels.cpu.layout import WeightLayout, unpack_linear
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.lookup.levels import levels as levels_of
from qcompile.kernels.lookup.reference import look_up, lookup
from qcompile.kernels.rope.reference import rope


def cpu_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    k: int,
    layout: str,
    act: str,
    grid: Tensor | None = None,
) -> Tensor:
    """A linear layer over a packed weight: ``x_q @ w_q.T + bias + residual``.

    Args:
        x: ``[..., k]`` float32.
        packed: The weight in the layout of `qcompile.kernels.cpu.layout`, uint8.
        bias: ``[n]`` or None.
        residual: ``[..., n]``, added last, or None.
        n: Output features.
        k: Input features.
        layout: How the weight is stored, the text of a `WeightLayout`.
        act: How `x` is rounded first: ``"float"`` is not at all, others are `IntegerActivations`.
            Of codes without a sign kernels multiply ``(code - middle) * scale``, and `bias` holds
            what that lacks, ``(middle - zero point) * scale * sum(w)``.
        grid: Scale and zero point of static codes, ``[2]`` float32; else None.

    Returns:
        ``[..., n]`` float32.
    """
    weight = UnpackedWeight.of(packed, n, k, WeightLayout.parse(layout))
    rounding = IntegerActivations.parse(act)
    if rounding is not None:
        x = rounding.round(x, weight.layout.group_size, grid)
        if grid is not None and not rounding.signed:
            bias = _whole_bias(bias, weight, grid, rounding.middle)
    # Some rows at a time: a projection to the vocabulary is large, and larger in float64.
    blocks = torch.arange(n).split(max(1, _DECODED_AT_A_TIME // k))
    y = torch.cat([x @ weight.rows(block).to(x.dtype).T for block in blocks], dim=-1)
    if bias is not None:
        y = y + bias
    return y if residual is None else y + residual


def _whole_bias(bias: Tensor | None, weight: UnpackedWeight, grid: Tensor, middle: int) -> Tensor:
    """The bias of a layer whose codes need not be moved."""
    assert bias is not None
    rows = weight.rows(torch.arange(len(bias))).to(grid.dtype)
    return bias + (grid[1] - middle) * grid[0] * rows.sum(1)


def cpu_embedding(
    ids: Tensor,
    packed: Tensor,
    n: int,
    k: int,
    layout: str,
) -> Tensor:
    """Rows of a packed table: ``[...]`` ids to ``[..., k]`` float32."""
    weight = UnpackedWeight.of(packed, n, k, WeightLayout.parse(layout))
    return weight.rows(ids.flatten()).reshape(*ids.shape, k)


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding, cache append and attention in one node, heads side by side.

    Args:
        query: ``[B, S, num_heads * D]``.
        key: ``[B, S, num_kv_heads * D]``.
        value: ``[B, S, num_kv_heads * Dv]``.
        past_key: ``[B, num_kv_heads, P, D]`` or None. (The runtime's buffers are larger.)
        past_value: ``[B, num_kv_heads, P, Dv]`` or None.
        key_mask: ``[B, P + S]``, nonzero where a key may be attended to; or None.
        bias: Added to the scores, broadcastable to ``[B, num_heads, S, P + S]``; or None.
        cos: ``[B or 1, S, R / 2]`` to rotate query and key by; or None.
        sin: As `cos`.
        sinks: ``[num_heads]`` or None.
        num_heads: Heads of the query.
        num_kv_heads: Heads of key and value.
        scale: Multiplies the scores.
        causal: Whether a query sees only positions up to its own.
        window: As for `qc.attention`.
        softcap: As for `qc.attention`.
        interleaved: Which channels a rotation pairs.

    Returns:
        ``[B, S, num_heads * Dv]``, and key and value with the new positions appended.
    """
    q, k, v = (
        _split_heads(query, num_heads),
        _split_heads(key, num_kv_heads),
        _split_heads(value, num_kv_heads),
    )
    if cos is not None and sin is not None:
        q, k = rope(q, cos, sin, interleaved), rope(k, cos, sin, interleaved)
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), dim=2), torch.cat((past_value, v), dim=2)
    out = attention(q, k, v, bias, key_mask, sinks, scale, causal, window, softcap)
    return out.transpose(1, 2).flatten(2).clone(), k.clone(), v.clone()


def _linear_shape(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    del packed
    n = rest[2]
    assert isinstance(n, int)
    return x.new_empty((*x.shape[:-1], n))


def _embedding_shape(ids: Tensor, packed: Tensor, n: int, k: int, *rest: object) -> Tensor:
    del packed, n, rest
    return torch.empty((*ids.shape, k), dtype=torch.float32, device=ids.device)


def _attention_shape(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor | None,
    past_value: Tensor | None,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = rest[5], rest[6]
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    batch, length, width = query.shape[0], query.shape[1], value.shape[2] // kv_heads
    out = query.new_empty((batch, length, heads * width))
    new_key = query.new_empty((batch, kv_heads, length, key.shape[2] // kv_heads))
    new_value = query.new_empty((batch, kv_heads, length, width))
    if past_key is None or past_value is None:
        return out, new_key, new_value
    return out, torch.cat((past_key, new_key), dim=2), torch.cat((past_value, new_value), dim=2)


_DECODED_AT_A_TIME = 1 << 22
"""Weights that are floats at once while a lowered program is interpreted."""


@dataclass(frozen=True)
class UnpackedWeight:
    """The codes of a packed weight, and what they stand for."""

    layout: WeightLayout
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    levels: Tensor | None  # None of integers

    @staticmethod
    def of(packed: Tensor, n: int, k: int, layout: WeightLayout) -> UnpackedWeight:
        """A weight ``[n, k]`` from its packed bytes."""
        unpacked = unpack_linear(packed.cpu().numpy(), n, k, layout)
        scale = torch.from_numpy(unpacked.scale)
        if scale.dtype == torch.uint8:
            outer = unpacked.outer_scale
            shared = None if outer is None else torch.from_numpy(outer).unsqueeze(1)
            scale = lookup(scale, shared, layout.scale_dtype, 0)
        zeros = None if unpacked.zero_point is None else torch.from_numpy(unpacked.zero_point)
        levels = unpacked.levels
        if levels is None and layout.coding != "integer":
            levels = np.array(levels_of(layout.coding), np.float32)
        table = None if levels is None else torch.from_numpy(levels)
        return UnpackedWeight(layout, torch.from_numpy(unpacked.codes), scale, zeros, table)

    def rows(self, index: Tensor) -> Tensor:
        """Some rows as float32."""
        codes, scale, group_size = self.codes[index], self.scale[index], self.layout.group_size
        if self.levels is not None:
            return look_up(codes, scale, self.levels, group_size)
        zero_point = None if self.zero_point is None else self.zero_point[index]
        return dequantize(codes, scale, zero_point, self.layout.bits, group_size)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (heads, -1))
    return split.transpose(1, 2)


linear = dialect.define(cpu_linear, shape=_linear_shape, differentiable=False)
embedding = dialect.define(cpu_embedding, shape=_embedding_shape, differentiable=False)
fused_attention = dialect.define(cpu_attention, shape=_attention_shape, differentiable=False)
