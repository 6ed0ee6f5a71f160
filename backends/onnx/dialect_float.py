"""Activations in small floats: 8-bit ones by ONNX's own types, the others by arithmetic."""

from __future__ import annotations

from math import log

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import covering_scale, spread_groups
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError, static_size
from qcompile.kernels.lookup.levels import float_fields
from qcompile.kernels.quantize_float.reference import largest_level

qc = torch.ops.qc

FLOATS = Table()

FLOAT8_TYPES = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e5m2": ir.DataType.FLOAT8E5M2}
"""Tables of levels, and the types whose elements are their codes."""

_FLOAT = ir.DataType.FLOAT


@FLOATS.register(qc.float_scale.default)
def _float_scale(b: Builder, x: ir.Value, levels: str, group_size: int) -> ir.Value:
    return covering_scale(b, x, largest_level(levels), group_size)


@FLOATS.register(qc.quantize_float.default)
def _quantize_float(
    b: Builder, x: ir.Value, scale: ir.Value, levels: str, group_size: int
) -> ir.Value:
    # Standard operators cannot look at the bits of a float: codes are elements, not bytes.
    if any(user.target is not qc.lookup.default for user in b.node.users):
        raise UnsupportedError("codes of small floats that are not only decoded")
    size, groups = (static_size(b.shape(value)[-1]) for value in (x, scale))
    if size is None or groups is None:
        raise UnsupportedError("a last axis whose size varies")
    ratio = b.op(
        "Div", b.cast(x, _FLOAT), spread_groups(b, scale, groups, size, group_size, _FLOAT)
    )
    if levels in FLOAT8_TYPES:
        return b.cast(ratio, FLOAT8_TYPES[levels])  # `Cast` saturates unless told otherwise
    return _nearest_level(b, ratio, levels)


def _nearest_level(b: Builder, ratio: ir.Value, levels: str) -> ir.Value:
    """The nearest numbers of a table as float32, as the oracle rounds.

    A logarithm that errs puts a value next to a power of two into the binade beside its own, whose
    steps are twice or half as long: both have that power, and it is the nearest number.
    """
    fields = float_fields(levels)
    assert fields is not None
    largest, least = largest_level(levels), fields.least_exponent
    clipped = b.op("Clip", ratio, -largest, largest)
    logarithm = b.op("Mul", b.op("Log", b.op("Abs", clipped)), 1 / log(2))
    most = least + max(2**fields.exponent_bits - 2, 0)
    binade = b.op("Clip", b.op("Floor", logarithm), float(least), float(most))
    exponent = b.op("Sub", binade, float(fields.mantissa_bits))
    step = b.op("Pow", b.constant(2.0, _FLOAT), exponent)
    return b.op("Mul", b.op("Round", b.op("Div", clipped, step)), step)
