"""Caches of few bits in standard operators: positions to rows of bytes, and back.

No standard operator reads the bits of a float, so that float16 scales become bytes by arithmetic,
which is exact: with the exponent field ``e`` of a scale and ``m = max(e, 1)``, its bits are
``scale * 2^(25 - m) + 1024 * (m - 1)``.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import decode, spread_groups
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError, static_size
from qcompile.kernels.kv_append.rows import code_bytes
from qcompile.kernels.quantize.groups import group_count

CACHE = Table()

FORMATS = {"int8": 8, "int4": 4}
"""Formats of caches that standard operators can express, and the bits of their codes."""

_FLOAT, _UINT8, _INT64 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT64
_HALF = ir.DataType.FLOAT16
_EXPONENTS = range(31)  # of finite float16


@CACHE.register(torch.ops.qc.kv_encode.default)
def _encode(b: Builder, x: ir.Value, format: str, group_size: int) -> ir.Value:
    bits, width = _bits(format), _width(b, x)
    groups, last = group_count(width, group_size), float(2 ** _bits(format) - 1)
    x = b.cast(x, _FLOAT)
    least, most = _ranges(b, x, width, group_size)
    exact = b.op("Div", b.op("Sub", most, least), last)
    scale = b.cast(b.cast(exact, _HALF), _FLOAT)
    scale = b.op("Where", b.op("Equal", scale, 0.0), b.constant(1.0, _FLOAT), scale)
    zero_point = b.op("Clip", b.op("Round", b.op("Div", b.op("Neg", least), scale)), 0.0, last)

    def spread(per_group: ir.Value) -> ir.Value:
        return spread_groups(b, per_group, groups, width, group_size, _FLOAT)

    steps = b.op("Round", b.op("Div", x, spread(scale)))
    codes = b.op("Clip", b.op("Add", steps, spread(zero_point)), 0.0, last)
    packed = _pack(b, b.cast(codes, _UINT8), bits, width)
    return b.op("Concat", packed, _half_bytes(b, scale, groups), b.cast(zero_point, _UINT8), axis=3)


@CACHE.register(torch.ops.qc.kv_decode.default)
def _decode(b: Builder, rows: ir.Value, format: str, group_size: int, width: int) -> ir.Value:
    bits, groups = _bits(format), group_count(width, group_size)
    scales_at = code_bytes(width, bits)
    zero_points_at = scales_at + 2 * groups
    codes = _unpack(b, b.slice(rows, 3, 0, scales_at), bits, width)
    low, high = (b.slice(rows, 3, scales_at + i, zero_points_at, 2) for i in (0, 1))
    scale = _half_of_bytes(b, low, high)
    zero_point = b.slice(rows, 3, zero_points_at)
    return decode(b, codes, scale, zero_point, bits, group_size, groups=groups, size=width)


def _bits(format: str) -> int:
    if format not in FORMATS:
        raise UnsupportedError(f"a cache of {format}")
    return FORMATS[format]


def _width(b: Builder, x: ir.Value) -> int:
    width = static_size(b.shape(x)[-1])
    if width is None:
        raise UnsupportedError("a last axis whose size varies")
    return width


def _ranges(b: Builder, x: ir.Value, width: int, group_size: int) -> tuple[ir.Value, ir.Value]:
    """The least and the largest number of each group and 0, ``[..., G]``."""
    keep = 1
    if group_size:
        groups, keep = group_count(width, group_size), 0
        if padding := groups * group_size - width:
            x = b.op("Pad", x, [0, padding], None, [-1])
        target = b.op("Concat", b.op("Shape", x, end=-1), [groups, group_size], axis=0)
        x = b.op("Reshape", x, target)
    zero = b.constant(0.0, _FLOAT)
    least = b.op("Min", b.op("ReduceMin", x, [-1], keepdims=keep), zero)
    return least, b.op("Max", b.op("ReduceMax", x, [-1], keepdims=keep), zero)


def _half_bytes(b: Builder, scale: ir.Value, groups: int) -> ir.Value:
    """Positive numbers of float16 as bytes, low ones first: ``[..., G]`` to ``[..., 2 G]``."""
    thresholds = b.constant([2.0 ** (e - 15) for e in _EXPONENTS[2:]], _FLOAT)
    reached = b.op("GreaterOrEqual", b.op("Unsqueeze", scale, [-1]), thresholds)
    above_one = b.op("ReduceSum", b.cast(reached, _FLOAT), [-1], keepdims=0)  # m - 1
    places = b.cast(above_one, _INT64)
    factors = b.constant([2.0 ** (25 - max(e, 1)) for e in _EXPONENTS[1:]], _FLOAT)
    mantissa = b.op("Mul", scale, b.op("Gather", factors, places, axis=0))
    value = b.op("Add", mantissa, b.op("Mul", above_one, 1024.0))
    high = b.op("Floor", b.op("Mul", value, 2.0**-8))
    low = b.op("Sub", value, b.op("Mul", high, 256.0))
    pairs = b.op("Concat", *(b.op("Unsqueeze", part, [-1]) for part in (low, high)), axis=-1)
    return b.cast(b.op("Reshape", pairs, [0, 0, 0, 2 * groups]), _UINT8)


def _half_of_bytes(b: Builder, low: ir.Value, high: ir.Value) -> ir.Value:
    """The inverse."""
    value = b.op("Add", b.cast(low, _FLOAT), b.op("Mul", b.cast(high, _FLOAT), 256.0))
    exponent = b.op("Floor", b.op("Mul", value, 2.0**-10))
    above_one = b.op("Max", b.op("Sub", exponent, 1.0), b.constant(0.0, _FLOAT))  # m - 1
    factors = b.constant([2.0 ** (max(e, 1) - 25) for e in _EXPONENTS[1:]], _FLOAT)
    mantissa = b.op("Sub", value, b.op("Mul", above_one, 1024.0))
    return b.op("Mul", mantissa, b.op("Gather", factors, b.cast(above_one, _INT64), axis=0))


def _pack(b: Builder, codes: ir.Value, bits: int, width: int) -> ir.Value:
    if bits == 8:
        return codes
    half = code_bytes(width, bits)
    low, high = b.slice(codes, 3, 0, half), b.slice(codes, 3, half)
    if width % 2:
        high = b.op("Pad", high, [0, 1], None, [-1])
    four = b.constant(4, _UINT8)
    return b.op("BitwiseOr", low, b.op("BitShift", high, four, direction="LEFT"))


def _unpack(b: Builder, packed: ir.Value, bits: int, width: int) -> ir.Value:
    if bits == 8:
        return packed
    low = b.op("BitwiseAnd", packed, b.constant(15, _UINT8))
    high = b.op("BitShift", packed, b.constant(4, _UINT8), direction="RIGHT")
    if width % 2:
        high = b.slice(high, 3, 0, width // 2)
    return b.op("Concat", low, high, axis=3)
