"""The `qc::` operators in standard ones, each as its reference defines it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.aten_activation import gelu, silu
from qcompile.backends.onnx.aten_linear import masked_softmax, share_heads, swap_axes_of
from qcompile.backends.onnx.aten_norm import layer_normalize, rms_normalize
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.sizes import subtract
from qcompile.backends.onnx.transform import emit_transform, standard_hadamard
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import Number, UnsupportedError, static_size
from qcompile.kernels.kv_append.rows import FLOAT_CACHE
from qcompile.kernels.quantize.groups import group_count

qc = torch.ops.qc

DIALECT = Table()

_BOOL, _INT64, _FLOAT = ir.DataType.BOOL, ir.DataType.INT64, ir.DataType.FLOAT


@DIALECT.register(qc.rms_norm.default)
def _rms_norm(b: Builder, x: ir.Value, weight: ir.Value | None, eps: float) -> ir.Value:
    return rms_normalize(b, x, weight, eps)


@DIALECT.register(qc.layer_norm.default)
def _layer_norm(
    b: Builder, x: ir.Value, weight: ir.Value | None, bias: ir.Value | None, eps: float
) -> ir.Value:
    return layer_normalize(b, x, [_last(b, x)], weight, bias, eps)


def _last(b: Builder, x: ir.Value) -> int:
    size = static_size(b.shape(x)[-1])
    if size is None:
        raise UnsupportedError("a last axis whose size varies")
    return size


@DIALECT.register(qc.rope.default)
def _rope(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, interleaved: bool) -> ir.Value:
    half, size = _last(b, cos), _last(b, x)
    rotary = x if size == 2 * half else b.slice(x, 3, 0, 2 * half)
    cos, sin = (b.op("Unsqueeze", table, [1]) for table in (cos, sin))
    if interleaved:
        first, second = (b.slice(rotary, 3, start, None, 2) for start in (0, 1))
    else:
        first, second = b.ops("Split", rotary, outputs=2, axis=3, num_outputs=2)
    turned = [
        b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin)),
        b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin)),
    ]
    if interleaved:
        pairs = b.op("Concat", *(b.op("Unsqueeze", part, [-1]) for part in turned), axis=-1)
        turned = [b.op("Reshape", pairs, [0, 0, 0, 2 * half])]
    if size > 2 * half:
        turned.append(b.slice(x, 3, 2 * half))
    return turned[0] if len(turned) == 1 else b.op("Concat", *turned, axis=3)


@DIALECT.register(qc.attention.default)
def attention(
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
    """Attention in products of matrices and a softmax."""
    heads = b.shape(query)[1]
    wide_key, wide_value = (share_heads(b, x, heads) for x in (key, value))
    scores = b.op("MatMul", b.op("Mul", query, scale), swap_axes_of(b, wide_key, 4))
    if softcap > 0:
        scores = b.op("Mul", b.op("Tanh", b.op("Div", scores, softcap)), softcap)
    additive = mask is not None and mask.dtype != _BOOL
    if mask is not None and additive:
        scores = b.op("Add", scores, b.cast(mask, b.dtype))
    allowed = allowed_pairs(b, query, key, None if additive else mask, key_mask, causal, window)
    if sinks is None:
        return b.op("MatMul", masked_softmax(b, scores, allowed, guard=additive), wide_value)
    if allowed is not None:
        scores = b.op("Where", allowed, scores, b.constant(float("-inf"), b.dtype))
    rows = b.op("Concat", b.op("Shape", scores, end=3), [1], axis=0)
    column = b.op("Expand", b.op("Reshape", b.cast(sinks, b.dtype), [1, -1, 1, 1]), rows)
    weights = b.op("Softmax", b.op("Concat", scores, column, axis=-1), axis=-1)
    return b.op("MatMul", b.slice(weights, 3, 0, -1), wide_value)


def allowed_pairs(
    b: Builder,
    query: ir.Value,
    key: ir.Value,
    mask: ir.Value | None,
    key_mask: ir.Value | None,
    causal: bool,
    window: int,
) -> ir.Value | None:
    """Which (query, key) pairs may meet, ``[B or 1, Hq or 1, S or 1, T]``; None when all may.

    Layers that agree on it share it.
    """
    if mask is None and key_mask is None and not causal and window <= 0:
        return None

    def make() -> ir.Value:
        terms = [] if mask is None else [mask]
        if key_mask is not None:
            terms.append(b.op("Unsqueeze", b.cast(key_mask, _BOOL), [1, 2]))
        if causal or window > 0:
            terms += _positions_within(b, query, key, causal, window)
        allowed = terms[0]
        for term in terms[1:]:
            allowed = b.op("And", allowed, term)
        return allowed

    sizes = (b.shape(query)[2], b.shape(key)[2])
    return b.once(("allowed pairs", *map(str, sizes), mask, key_mask, causal, window), make)


def _positions_within(
    b: Builder, query: ir.Value, key: ir.Value, causal: bool, window: int
) -> list[ir.Value]:
    """Boolean ``[S, T]`` matrices: no key after its query, and none too far before it."""
    queries, keys = (b.axis_size(x, 2) for x in (query, key))
    key_position = _range(b, 0, keys)
    position = b.op("Unsqueeze", _range(b, subtract(b, keys, queries), keys), [1])
    terms = [b.op("LessOrEqual", key_position, position)] if causal else []
    if window > 0:
        terms.append(b.op("Greater", key_position, b.op("Sub", position, window)))
    return terms


def _range(b: Builder, start: Number, end: Number) -> ir.Value:
    if isinstance(start, int) and isinstance(end, int):
        return b.constant(range(start, end), _INT64)
    return b.op("Range", *(b.tensor(x, _INT64) for x in (start, end, 1)))


def _squared_relu(b: Builder, x: ir.Value) -> ir.Value:
    positive = b.op("Relu", x)
    return b.op("Mul", positive, positive)


_ACTIVATIONS: dict[str, Callable[[Builder, ir.Value], ir.Value]] = {
    "identity": lambda b, x: b.op("Identity", x),
    "relu": lambda b, x: b.op("Relu", x),
    "relu2": _squared_relu,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda b, x: gelu(b, x, "tanh"),
    "sigmoid": lambda b, x: b.op("Sigmoid", x),
    "tanh": lambda b, x: b.op("Tanh", x),
    "quick_gelu": lambda b, x: b.op("Mul", x, b.op("Sigmoid", b.op("Mul", x, 1.702))),
}


@DIALECT.register(qc.act.default)
def activate(b: Builder, x: ir.Value, kind: str) -> ir.Value:
    """An activation by name."""
    if kind not in _ACTIVATIONS:
        raise UnsupportedError(f"the activation '{kind}'")
    return _ACTIVATIONS[kind](b, x)


@DIALECT.register(qc.gated_act.default)
def _gated_act(b: Builder, gate: ir.Value, up: ir.Value, kind: str) -> ir.Value:
    return b.op("Mul", activate(b, gate, kind), up)


@DIALECT.register(qc.kv_append.default)
def _kv_append(
    b: Builder, past: ir.Value, new: ir.Value, format: str = FLOAT_CACHE, group_size: int = 0
) -> ir.Value:
    del group_size
    if format != FLOAT_CACHE:
        raise UnsupportedError(f"a cache of {format} that is no input of the model")
    return b.op("Concat", past, new, axis=2)


@DIALECT.register(qc.dynamic_scale.default)
def _dynamic_scale(b: Builder, x: ir.Value, bits: int, group_size: int) -> ir.Value:
    return covering_scale(b, x, 2 ** (bits - 1) - 1, group_size)


def covering_scale(b: Builder, x: ir.Value, largest: float, group_size: int) -> ir.Value:
    """The scale of each group that lets its largest magnitude become a level.

    Args:
        b: Where nodes go.
        x: ``[..., K]``.
        largest: The level.
        group_size: Elements per scale; 0 is one group.

    Returns:
        ``[..., groups]`` in the type of the present result; 1 where all is 0.
    """
    size = _last(b, x)
    magnitude = b.op("Abs", b.cast(x, b.dtype))
    if group_size == 0:
        peak = b.op("ReduceMax", magnitude, [-1], keepdims=1)
    else:
        groups = group_count(size, group_size)
        if padding := groups * group_size - size:
            magnitude = b.op("Pad", magnitude, [0, padding], None, [-1])
        leading = b.op("Shape", x, end=-1)
        target = b.op("Concat", leading, [groups, group_size], axis=0)
        peak = b.op("ReduceMax", b.op("Reshape", magnitude, target), [-1], keepdims=0)
    scale = b.op("Div", peak, float(largest))
    return b.op("Where", b.op("Equal", scale, 0.0), b.constant(1.0, b.dtype), scale)


@DIALECT.register(qc.transform.default)
def _transform(
    b: Builder, x: ir.Value, params: Sequence[ir.Value], kind: str, dims: Sequence[int]
) -> ir.Value:
    return emit_transform(b, x, params, kind, dims, standard_hadamard)


@DIALECT.register(qc.quantize.default)
def _quantize(
    b: Builder,
    x: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    bits: int,
    group_size: int,
) -> ir.Value:
    # QuantizeLinear is another function: it rounds to all 2^bits codes and has no odd widths.
    size = _last(b, x)
    wide = ir.DataType.DOUBLE if x.dtype == ir.DataType.DOUBLE else _FLOAT
    spread = spread_groups(b, scale, _last(b, scale), size, group_size, wide)
    ratio = b.op("Div", b.cast(x, wide), spread)
    steps = b.op("Round", ratio)
    steps = b.op("Where", b.op("IsNaN", steps), b.constant(0.0, wide), steps)
    if zero_point is None:
        largest = float(2 ** (bits - 1) - 1)
        return b.cast(b.op("Clip", steps, -largest, largest), ir.DataType.INT8)
    offset = spread_groups(b, zero_point, _last(b, zero_point), size, group_size, wide)
    codes = b.op("Clip", b.op("Add", steps, offset), 0.0, float(2**bits - 1))
    return b.cast(codes, ir.DataType.UINT8)


@DIALECT.register(qc.dequantize.default)
def dequantize(
    b: Builder,
    codes: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    bits: int,
    group_size: int,
) -> ir.Value:
    """Values of codes, in elementary arithmetic."""
    groups, size = _last(b, scale), _last(b, codes)
    return decode(b, codes, scale, zero_point, bits, group_size, groups=groups, size=size)


def decode(
    b: Builder,
    codes: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    bits: int,
    group_size: int,
    *,
    groups: int,
    size: int,
) -> ir.Value:
    """``(codes - zero_point) * scale``, as the oracle of `qc::dequantize` has it.

    Args:
        b: Where nodes go; its `dtype` is that of the result.
        codes: ``[..., size]`` uint8 or int8.
        scale: ``[..., groups]``.
        zero_point: ``[..., groups]`` or None.
        bits: Width of the codes.
        group_size: Codes per scale; 0 is one group.
        groups: How many scales a row has.
        size: How many codes a row has.
    """
    steps = b.cast(codes, b.dtype)
    if zero_point is not None:
        offset = spread_groups(b, zero_point, groups, size, group_size, b.dtype)
        steps = b.op("Sub", steps, offset)
    elif codes.dtype == ir.DataType.UINT8:
        steps = b.op("Sub", steps, float(2 ** (bits - 1)))
    return b.op("Mul", steps, spread_groups(b, scale, groups, size, group_size, b.dtype))


def spread_groups(
    b: Builder,
    per_group: ir.Value,
    groups: int,
    size: int,
    group_size: int,
    dtype: ir.DataType,
) -> ir.Value:
    """One value per group repeated for each element of the group; see the kernels' `groups`."""
    values = b.cast(per_group, dtype)
    if groups == 1:
        return values
    places = b.constant([k // group_size for k in range(size)], _INT64)
    return b.op("Gather", values, places, axis=-1)
