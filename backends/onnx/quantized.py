"""Quantized layers in standard operators.

1. ``linear(x, dequantize(W), b)``  =>  ``MatMul(x, DequantizeLinear(W[K, N])) + b``, in blocks
   along K; run times fuse the two.
2. the same with `x` rounded to int8 per token, and one scale of 8-bit codes per column  =>
   ``MatMulInteger`` of unsigned codes, scaled afterwards; unless zero points are floats.
3. ``embedding(dequantize(W), ids)``  =>  ``Gather`` of packed rows, unpacked and decoded.
4. the same of weights that are looked up in a table: see `stored_levels`.
5. ``dequantize(quantize(x, s))`` with a stored scale per tensor  =>  ``QuantizeLinear`` and, before
   8-bit codes with one scale per column, ``DequantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompile.backends.onnx import dialect as standard
from qcompile.backends.onnx.aten_indexing import embedding as float_embedding
from qcompile.backends.onnx.aten_linear import linear as float_linear
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.stored import (
    StoredCodes,
    byte_codes,
    decoded_codes,
    matrix_scale,
    matrix_zero_point,
    row_codes,
    unpack_rows,
)
from qcompile.backends.onnx.stored_levels import decoded_matrix, gathered_rows, stored_levels
from qcompile.backends.onnx.translation import Table, Translation
from qcompile.ir import dialect
from qcompile.ir.weights import TensorSpec
from qcompile.passes.lower.rounded_inputs import RoundedInput, rounded_input

aten = torch.ops.aten

_TABLE = Table()

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
_BYTE = 8
_MIDDLE = 128
"""Code of 0 where symmetric 8-bit codes stand as unsigned ones."""


@_TABLE.register(aten.linear.default)
def _linear(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    by_table, stored = stored_levels(b.node.args[1]), StoredCodes.behind(b.node.args[1])
    if by_table is not None:
        product = b.op("MatMul", x, decoded_matrix(b, by_table))
    elif stored is None:
        return float_linear(b, x, weight, bias)
    elif (rounded := rounded_input(b.node.args[0])) and _multiplies_integers(rounded, stored):
        product = _integer_product(b, rounded, stored)
    else:
        product = b.op("MatMul", x, decoded_codes(b, stored))
    return product if bias is None else b.op("Add", product, bias)


def _multiplies_integers(rounded: RoundedInput, stored: StoredCodes) -> bool:
    """Whether products of codes can be summed as integers: the scales are outside of the sum."""
    return (
        rounded.is_dynamic
        and rounded.bits == 8
        and rounded.groups == 1
        and _has_byte_columns(stored)
    )


def _has_byte_columns(stored: StoredCodes) -> bool:
    """Whether a weight is bytes, with one scale per column and whole zero points."""
    return stored.groups == 1 and stored.container == 8 and not stored.has_float_zero_points


def _integer_product(b: Builder, rounded: RoundedInput, stored: StoredCodes) -> ir.Value:
    codes = _unsigned_codes(b, rounded)
    # Unsigned by unsigned: run times multiply signed codes slowly, and unsigned by signed ones
    # inexactly on machines whose instruction for it saturates (AVX2, AVX-512 without VNNI).
    zero_point = matrix_zero_point(b, stored, 8)
    if zero_point is None:
        zero_point = b.constant(2 ** (stored.bits - 1), _UINT8)
    middle = b.constant(_MIDDLE, _UINT8)
    sums = b.op(
        "MatMulInteger", codes, byte_codes(b, stored), middle, zero_point, dtype=ir.DataType.INT32
    )
    scaled = b.op("Mul", b.cast(sums, _FLOAT), b.emitted[rounded.scale])
    return b.op("Mul", scaled, matrix_scale(b, stored))


def _unsigned_codes(b: Builder, rounded: RoundedInput) -> ir.Value:
    """The codes of a dynamically rounded input, moved up by `_MIDDLE`; one per input."""

    def make() -> ir.Value:
        # No limits are needed: the scale was measured on these very values.
        ratio = b.op("Div", b.emitted[rounded.source], b.emitted[rounded.scale])
        steps = b.op("Add", b.op("Round", ratio), float(_MIDDLE))
        return b.cast(steps, _UINT8)

    return b.once((rounded.codes, "unsigned"), make)


@_TABLE.register(aten.embedding.default)
def _embedding(b: Builder, table: ir.Value, ids: ir.Value, *rest: Any, **named: Any) -> ir.Value:
    by_table, stored = stored_levels(b.node.args[0]), StoredCodes.behind(b.node.args[0])
    if by_table is not None:
        return gathered_rows(b, by_table, ids)
    if stored is None:
        return float_embedding(b, table, ids, *rest, **named)
    packed = b.op("Gather", row_codes(b, stored), ids, axis=0)
    codes = unpack_rows(b, packed, stored.shape[1], stored.row_container)
    scale = b.op("Gather", b.emitted[stored.scale], ids, axis=0)
    zero_point = None
    if stored.zero_point is not None:
        zero_point = b.op("Gather", b.weight(stored.zero_point), ids, axis=0)
    return standard.decode(
        b,
        codes,
        scale,
        zero_point,
        stored.bits,
        stored.group_size,
        groups=stored.groups,
        size=stored.shape[1],
    )


@_TABLE.register(dialect.dequantize)
def _dequantize(
    b: Builder,
    codes: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    bits: int,
    group_size: int,
) -> ir.Value:
    rounded = rounded_input(b.node)
    if rounded is None or rounded.bits != _BYTE or not rounded.has_one_stored_scale:
        return standard.dequantize(b, codes, scale, zero_point, bits, group_size)
    return _rounded_per_tensor(b, rounded)


def _rounded_per_tensor(b: Builder, rounded: RoundedInput) -> ir.Value:
    """A float value through unsigned 8-bit codes and back."""
    scale = b.cast(_scalar(b, rounded.scale), _FLOAT)
    x = b.emitted[rounded.source]
    if rounded.zero_point is None:
        zero_point = b.constant(_MIDDLE, _UINT8)
        # `QuantizeLinear` would use the code -128 as well, which symmetric codes do not have.
        x = b.op("Max", x, b.op("Mul", scale, float(1 - _MIDDLE)))
    else:
        zero_point = _scalar(b, rounded.zero_point)
    codes = b.op("QuantizeLinear", x, scale, zero_point, dtype=_UINT8)
    if all(map(_multiplies_bytes, b.node.users)):
        return b.op("DequantizeLinear", codes, scale, zero_point, dtype=_FLOAT)
    # Beside a weight of any other kind ONNX Runtime 1.31 takes the pair for a part of an integer
    # product: it ignores blocks, fails on 8-bit floats, and fuses 4-bit weights no more.
    steps = b.op("Sub", b.cast(codes, _FLOAT), b.cast(zero_point, _FLOAT))
    return b.op("Mul", steps, scale)


def _multiplies_bytes(user: fx.Node) -> bool:
    """Whether a reader is a linear layer over 8-bit integers with one scale per column."""
    if user.target is not aten.linear.default:
        return False
    stored = StoredCodes.behind(user.args[1])
    return stored is not None and _has_byte_columns(stored)


def _scalar(b: Builder, node: fx.Node) -> ir.Value:
    spec = TensorSpec((), node.meta["val"].dtype)
    return b.arranged_weight(str(node.target), "scalar", spec, lambda x: x.reshape(()))


TRANSLATIONS: Mapping[Any, Translation] = MappingProxyType(_TABLE)
"""Layers over stored codes; everything else is left to the standard translations."""
