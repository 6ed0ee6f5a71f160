"""How the lowered operators are written in ONNX: one node of ``com.qcompile`` each."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnx_ir as ir

from qcompile.backends.cpu import expert_ops, fused_ops, ops
from qcompile.backends.cpu.cached_attention import cached_attention
from qcompile.backends.cpu.sparse_linear import SPARSE_LINEAR
from qcompile.backends.cpu.vector_linear import VECTOR_LINEAR
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.transform import Place, emit_transform
from qcompile.backends.onnx.translation import Table, Translation
from qcompile.ir import dialect
from qcompile.kernels.cpu import OPERATOR_DOMAIN
from qcompile.kernels.cpu.layout import WeightLayout
from qcompile.kernels.hadamard.matrix import core, core_order

FLOAT = ir.DataType.FLOAT
INT64 = ir.DataType.INT64
UINT8 = ir.DataType.UINT8

GATED_ACTIVATIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh", "sigmoid", "tanh")
"""What the library's `GatedActivation` knows; others are spelled in standard operators."""

_TABLE = Table({**VECTOR_LINEAR, **SPARSE_LINEAR})


@_TABLE.register(ops.linear)
def _linear(
    b: Builder,
    x: ir.Value,
    packed: ir.Value,
    bias: ir.Value | None,
    residual: ir.Value | None,
    n: int,
    k: int,
    layout: str,
    act: str,
    grid: ir.Value | None = None,
) -> ir.Value:
    return b.op(
        "QLinear",
        *(x, packed, bias, residual, grid),
        domain=OPERATOR_DOMAIN,
        dtype=FLOAT,
        N=n,
        K=k,
        **WeightLayout.parse(layout).attributes(),
        act=act,
    )


@_TABLE.register(fused_ops.linears)
def _linears(
    b: Builder,
    x: ir.Value,
    norm_weight: ir.Value | None,
    packed: Sequence[ir.Value],
    biases: Sequence[ir.Value],
    sizes: Sequence[int],
    k: int,
    layout: str,
    act: str,
    normed: bool,
    epsilon: float,
    grid: ir.Value | None = None,
) -> tuple[ir.Value, ...]:
    count = len(packed)
    added: Sequence[ir.Value | None] = biases or (None,) * count
    layers = [operand for layer in zip(packed, added, strict=True) for operand in layer]
    missing = [None] * (2 * fused_ops.MOST_LAYERS - len(layers))
    return b.ops(
        "QLinears",
        *(x, norm_weight, *layers, *missing, grid),
        outputs=count,
        domain=OPERATOR_DOMAIN,
        dtypes=(FLOAT,) * count,
        count=count,
        **{f"N{i}": size for i, size in enumerate(sizes)},
        K=k,
        **WeightLayout.parse(layout).attributes(),
        act=act,
        normed=int(normed),
        epsilon=float(epsilon),
    )


@_TABLE.register(fused_ops.gated_linear)
def _gated_linear(
    b: Builder,
    x: ir.Value,
    norm_weight: ir.Value | None,
    gate: ir.Value,
    gate_bias: ir.Value | None,
    up: ir.Value,
    up_bias: ir.Value | None,
    n: int,
    k: int,
    layout: str,
    act: str,
    kind: str,
    normed: bool,
    epsilon: float,
    grid: ir.Value | None = None,
) -> ir.Value:
    return b.op(
        "QGatedLinear",
        *(x, norm_weight, gate, gate_bias, up, up_bias, grid),
        domain=OPERATOR_DOMAIN,
        dtype=FLOAT,
        N=n,
        K=k,
        **WeightLayout.parse(layout).attributes(),
        act=act,
        kind=kind,
        normed=int(normed),
        epsilon=float(epsilon),
    )


@_TABLE.register(ops.embedding)
def _embedding(
    b: Builder,
    ids: ir.Value,
    packed: ir.Value,
    n: int,
    k: int,
    layout: str,
) -> ir.Value:
    attributes = WeightLayout.parse(layout).attributes()
    return b.op(
        "QEmbedding", ids, packed, domain=OPERATOR_DOMAIN, dtype=FLOAT, N=n, K=k, **attributes
    )


@_TABLE.register(expert_ops.experts)
def _experts(
    b: Builder,
    x: ir.Value,
    index: ir.Value,
    weight: ir.Value,
    up: ir.Value,
    up_bias: ir.Value | None,
    down: ir.Value,
    down_bias: ir.Value | None,
    count: int,
    n: int,
    k: int,
    up_layout: str,
    down_layout: str,
    kind: str,
    gated: bool,
    limit: float,
    offset: float,
    act: str,
) -> ir.Value:
    layouts = {"up": WeightLayout.parse(up_layout), "down": WeightLayout.parse(down_layout)}
    return b.op(
        "QExperts",
        *(x, index, weight, up, up_bias, down, down_bias),
        domain=OPERATOR_DOMAIN,
        dtype=FLOAT,
        count=count,
        up_N=n,
        up_K=k,
        down_N=k,
        down_K=n // 2 if gated else n,
        **{
            f"{part}_{name}": value
            for part, layout in layouts.items()
            for name, value in layout.attributes().items()
        },
        kind=kind,
        gated=int(gated),
        limit=float(limit),
        offset=float(offset),
        act=act,
    )


@_TABLE.register(ops.fused_attention)
def _attention(b: Builder, *arguments: Any) -> tuple[ir.Value, ...]:
    return _attend(b, "Attention", FLOAT, *arguments)


@_TABLE.register(cached_attention)
def _cached_attention(b: Builder, *arguments: Any) -> tuple[ir.Value, ...]:
    *shared, key_format, key_group_size, value_format, value_group_size = arguments
    return _attend(
        b,
        "QAttention",
        UINT8,
        *shared,
        key_format=key_format,
        key_group_size=key_group_size,
        value_format=value_format,
        value_group_size=value_group_size,
    )


def _attend(
    b: Builder,
    op_type: str,
    cache_dtype: ir.DataType,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    past_key: ir.Value | None,
    past_value: ir.Value | None,
    key_mask: ir.Value | None,
    bias: ir.Value | None,
    cos: ir.Value | None,
    sin: ir.Value | None,
    sinks: ir.Value | None,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    interleaved: bool,
    **formats: int | str,
) -> tuple[ir.Value, ...]:
    mask = None if key_mask is None else b.cast(key_mask, INT64)
    inputs = (query, key, value, past_key, past_value, mask, bias, cos, sin, sinks)
    rotary = 0 if cos is None else 2 * int(_argument(b, 7).meta["val"].shape[-1])
    dtypes = (FLOAT,) if past_key is None else (FLOAT, cache_dtype, cache_dtype)
    made = b.ops(
        op_type,
        *inputs,
        outputs=len(dtypes),
        domain=OPERATOR_DOMAIN,
        dtypes=dtypes,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        scale=float(scale),
        causal=int(causal),
        window=window,
        softcap=float(softcap),
        rotary_dim=rotary,
        interleaved=int(interleaved),
        **formats,
    )
    return made if past_key is not None else (made[0], key, value)


@_TABLE.register(dialect.rms_norm)
def _rms_norm(b: Builder, x: ir.Value, weight: ir.Value | None, eps: float) -> ir.Value:
    return b.op("RmsNorm", x, weight, domain=OPERATOR_DOMAIN, dtype=FLOAT, epsilon=eps)


@_TABLE.register(dialect.gated_act)
def _gated_act(b: Builder, gate: ir.Value, up: ir.Value, kind: str) -> ir.Value:
    if kind in GATED_ACTIVATIONS:
        return b.op("GatedActivation", gate, up, domain=OPERATOR_DOMAIN, dtype=FLOAT, kind=kind)
    from qcompile.backends.onnx.dialect import DIALECT

    standard: Any = DIALECT[dialect.gated_act]
    made: ir.Value = standard(b, gate, up, kind)
    return made


@_TABLE.register(dialect.transform)
def _transform(
    b: Builder, x: ir.Value, params: Sequence[ir.Value], kind: str, dims: Sequence[int]
) -> ir.Value:
    return emit_transform(b, x, params, kind, dims, _hadamard)


def _hadamard(b: Builder, x: ir.Value, place: Place, block: int, transposed: bool) -> ir.Value:
    del place
    order = core_order(block)
    assert order is not None
    factor = core(order).T if transposed else core(order)
    matrix = None if order == 1 else b.constant(factor.numpy(), FLOAT)
    return b.op("Hadamard", x, matrix, domain=OPERATOR_DOMAIN, dtype=FLOAT, block=block)


@_TABLE.register(operator.getitem)
def _getitem(b: Builder, values: tuple[Any, ...], index: int) -> Any:
    del b
    return values[index]


TRANSLATIONS: Mapping[Any, Translation] = MappingProxyType(_TABLE)
"""Lowered operators, and those of the dialect that the library has a kernel for."""


def _argument(b: Builder, position: int) -> Any:
    return b.node.args[position]
