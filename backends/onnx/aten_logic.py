"""Comparisons, logic, and choices between elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import Operand, computing_dtype, is_floating, to_ir_dtype

aten = torch.ops.aten

LOGIC = Table()

_BOOL = ir.DataType.BOOL


def where(b: Builder, condition: ir.Value, x: Operand, y: Operand, dtype: ir.DataType) -> ir.Value:
    """``x`` where the condition holds, else ``y``."""
    wide = computing_dtype(dtype)
    chosen = b.op("Where", b.cast(condition, _BOOL), b.tensor(x, wide), b.tensor(y, wide))
    return b.cast(chosen, dtype)


def _common_dtype(b: Builder) -> ir.DataType:
    """The type in which the first two operands of the present call are compared."""
    operands = [_example(argument) for argument in b.node.args[:2]]
    return computing_dtype(to_ir_dtype(torch.result_type(*operands)))


def _example(argument: Any) -> Any:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    return 1 if isinstance(value, torch.SymInt) else value


def _comparison(op_type: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, x: Operand, y: Operand) -> ir.Value:
        dtype = _common_dtype(b)
        return b.op(op_type, b.tensor(x, dtype), b.tensor(y, dtype))

    return translate


def _not_equal(b: Builder, x: Operand, y: Operand) -> ir.Value:
    return b.op("Not", _comparison("Equal")(b, x, y))


for _name, _translation in {
    "eq": _comparison("Equal"),
    "ne": _not_equal,
    "lt": _comparison("Less"),
    "le": _comparison("LessOrEqual"),
    "gt": _comparison("Greater"),
    "ge": _comparison("GreaterOrEqual"),
}.items():
    _packet = getattr(aten, _name)
    LOGIC.update({_packet.Tensor: _translation, _packet.Scalar: _translation})


def _logical(op_type: str) -> Callable[..., ir.Value]:
    return lambda b, x, y: b.op(op_type, b.tensor(x, _BOOL), b.tensor(y, _BOOL))


def _bitwise(logical: str, bitwise: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, x: Operand, y: Operand) -> ir.Value:
        op_type = logical if b.dtype == _BOOL else bitwise
        return b.op(op_type, b.tensor(x, b.dtype), b.tensor(y, b.dtype))

    return translate


LOGIC.update(
    {
        aten.logical_and.default: _logical("And"),
        aten.logical_or.default: _logical("Or"),
        aten.logical_xor.default: _logical("Xor"),
    }
)
for _name, _logical_type, _bitwise_type in (
    ("and", "And", "BitwiseAnd"),
    ("or", "Or", "BitwiseOr"),
    ("xor", "Xor", "BitwiseXor"),
):
    _translation = _bitwise(_logical_type, _bitwise_type)
    for _packet in (getattr(aten, f"bitwise_{_name}"), getattr(aten, f"__{_name}__")):
        LOGIC.update({_packet.Tensor: _translation, _packet.Scalar: _translation})


@LOGIC.register(aten.logical_not.default)
def _logical_not(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Not", b.cast(x, _BOOL))


@LOGIC.register(aten.bitwise_not.default)
def _bitwise_not(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Not" if b.dtype == _BOOL else "BitwiseNot", x)


@LOGIC.register(aten.isnan.default)
def is_nan(b: Builder, x: ir.Value) -> ir.Value:
    """Whether elements are not numbers."""
    return b.op("IsNaN", x) if _has_specials(x) else _nowhere(b, x)


@LOGIC.register(aten.isinf.default)
def _is_inf(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("IsInf", x) if _has_specials(x) else _nowhere(b, x)


@LOGIC.register(aten.isfinite.default)
def _is_finite(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Not", b.op("Or", _is_inf(b, x), is_nan(b, x)))


def _has_specials(x: ir.Value) -> bool:
    return x.dtype is not None and is_floating(x.dtype)


def _nowhere(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("And", b.cast(x, _BOOL), b.constant(False, _BOOL))


@LOGIC.register(aten.nan_to_num.default)
def nan_to_num(
    b: Builder,
    x: ir.Value,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> ir.Value:
    """Replaces what is not a finite number; by 0 and the type's limits unless told otherwise."""
    if not _has_specials(x):
        return x
    limits = torch.finfo(b.result.dtype)
    made = b.op("Where", b.op("IsNaN", x), b.constant(nan or 0.0, b.dtype), x)
    for bound, replacement in (
        (math.inf, limits.max if posinf is None else posinf),
        (-math.inf, limits.min if neginf is None else neginf),
    ):
        if bound != replacement:
            infinite = b.op("Equal", made, bound)
            made = b.op("Where", infinite, b.constant(replacement, b.dtype), made)
    return made


@LOGIC.register(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(b: Builder, condition: ir.Value, x: Operand, y: Operand) -> ir.Value:
    return where(b, condition, x, y, b.dtype)


@LOGIC.register(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: Builder, x: ir.Value, mask: ir.Value, value: Operand) -> ir.Value:
    return where(b, mask, value, x, b.dtype)


@LOGIC.register(aten.isin.Tensor_Tensor)
def _is_in(b: Builder, x: ir.Value, tests: ir.Value, **options: bool) -> ir.Value:
    wide = computing_dtype(x.dtype or ir.DataType.INT64)
    each = b.op("Unsqueeze", b.cast(x, wide), [-1])
    hits = b.cast(b.op("Equal", each, b.cast(tests, wide)), ir.DataType.INT32)
    found = b.cast(b.op("ReduceMax", hits, [-1], keepdims=0), _BOOL)
    return b.op("Not", found) if options.get("invert") else found
