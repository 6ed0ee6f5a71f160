"""Arithmetic, roots, exponentials and casts, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import (
    Operand,
    SymbolicScalar,
    UnsupportedError,
    computing_dtype,
    is_floating,
)

aten = torch.ops.aten

ELEMENTWISE = Table()


def arithmetic(b: Builder, op_type: str, *operands: Operand) -> ir.Value:
    """An operator on operands that are first cast to the type of the result."""
    wide = computing_dtype(b.dtype)
    return b.cast(b.op(op_type, *(b.tensor(x, wide) for x in operands)), b.dtype)


def _unary(op_type: str) -> Callable[..., ir.Value]:
    return lambda b, x: arithmetic(b, op_type, x)


def _binary(op_type: str) -> Callable[..., ir.Value]:
    return lambda b, x, y: arithmetic(b, op_type, x, y)


ELEMENTWISE.update(
    {
        target: _unary(op_type)
        for target, op_type in {
            aten.abs.default: "Abs",
            aten.acos.default: "Acos",
            aten.acosh.default: "Acosh",
            aten.asin.default: "Asin",
            aten.asinh.default: "Asinh",
            aten.atan.default: "Atan",
            aten.atanh.default: "Atanh",
            aten.ceil.default: "Ceil",
            aten.cos.default: "Cos",
            aten.cosh.default: "Cosh",
            aten.erf.default: "Erf",
            aten.exp.default: "Exp",
            aten.floor.default: "Floor",
            aten.log.default: "Log",
            aten.neg.default: "Neg",
            aten.reciprocal.default: "Reciprocal",
            aten.round.default: "Round",
            aten.sgn.default: "Sign",
            aten.sign.default: "Sign",
            aten.sin.default: "Sin",
            aten.sinh.default: "Sinh",
            aten.sqrt.default: "Sqrt",
            aten.tan.default: "Tan",
        }.items()
    }
)

ELEMENTWISE.update(
    {
        aten.mul.Tensor: _binary("Mul"),
        aten.mul.Scalar: _binary("Mul"),
        aten.maximum.default: _binary("Max"),
        aten.minimum.default: _binary("Min"),
        aten.max.other: _binary("Max"),
        aten.min.other: _binary("Min"),
    }
)


@ELEMENTWISE.register(aten.add.Tensor, aten.add.Scalar)
def add(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> ir.Value:
    """``x + alpha * y``."""
    if b.dtype == ir.DataType.BOOL:
        return b.op("Or", b.tensor(x, b.dtype), b.tensor(y, b.dtype))
    return arithmetic(b, "Add", x, _scaled(b, y, alpha))


@ELEMENTWISE.register(aten.sub.Tensor, aten.sub.Scalar)
def sub(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> ir.Value:
    """``x - alpha * y``."""
    return arithmetic(b, "Sub", x, _scaled(b, y, alpha))


@ELEMENTWISE.register(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(b: Builder, x: Operand, y: Operand, alpha: float = 1) -> ir.Value:
    """``y - alpha * x``."""
    return sub(b, y, x, alpha)


def _scaled(b: Builder, x: Operand, factor: float) -> Operand:
    return x if factor == 1 else b.op("Mul", b.tensor(x, computing_dtype(b.dtype)), factor)


@ELEMENTWISE.register(
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.div.Scalar_mode,
    aten.true_divide.Tensor,
)
def div(b: Builder, x: Operand, y: Operand, rounding_mode: str | None = None) -> ir.Value:
    """``x / y``, rounded down (``floor``) or towards zero (``trunc``) where asked."""
    if rounding_mode == "floor":
        return floor_divide(b, x, y)
    if rounding_mode == "trunc" and is_floating(b.dtype):
        return truncate(b, arithmetic(b, "Div", x, y))
    return arithmetic(b, "Div", x, y)


@ELEMENTWISE.register(aten.floor_divide.default)
def floor_divide(b: Builder, x: Operand, y: Operand) -> ir.Value:
    """``floor(x / y)``; ONNX divides integers towards zero."""
    if is_floating(b.dtype):
        return b.op("Floor", arithmetic(b, "Div", x, y))
    whole = arithmetic(b, "Sub", x, remainder(b, x, y))
    return arithmetic(b, "Div", whole, y)


@ELEMENTWISE.register(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def remainder(b: Builder, x: Operand, y: Operand) -> ir.Value:
    """``x - y * floor(x / y)``: the sign of the divisor."""
    if not is_floating(b.dtype):
        return arithmetic(b, "Mod", x, y)
    dividend, divisor = b.tensor(x, b.dtype), b.tensor(y, b.dtype)
    quotient = b.op("Floor", b.op("Div", dividend, divisor))
    return b.op("Sub", dividend, b.op("Mul", quotient, divisor))


@ELEMENTWISE.register(aten.fmod.Tensor, aten.fmod.Scalar)
def fmod(b: Builder, x: Operand, y: Operand) -> ir.Value:
    """The remainder with the sign of the dividend."""
    return b.op("Mod", b.tensor(x, b.dtype), b.tensor(y, b.dtype), fmod=1)


@ELEMENTWISE.register(aten.trunc.default, aten.fix.default)
def truncate(b: Builder, x: ir.Value) -> ir.Value:
    """Rounds towards zero."""
    return b.op("Mul", b.op("Sign", x), b.op("Floor", b.op("Abs", x)))


@ELEMENTWISE.register(aten.frac.default)
def _frac(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Sub", x, truncate(b, x))


@ELEMENTWISE.register(aten.round.decimals)
def _round_decimals(b: Builder, x: ir.Value, decimals: int = 0) -> ir.Value:
    unit = 10.0**decimals
    return b.op("Div", b.op("Round", b.op("Mul", x, unit)), unit)


@ELEMENTWISE.register(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(b: Builder, x: Operand, exponent: Operand) -> ir.Value:
    """``x ** exponent``; small constant exponents without `Pow`, which is slow."""
    base = b.tensor(x, computing_dtype(b.dtype))
    if exponent in (0.5, -0.5, -1) and not is_floating(b.dtype):
        raise UnsupportedError("an integer to a fractional power")
    match exponent:
        case 1:
            made = base
        case 2:
            made = b.op("Mul", base, base)
        case 3:
            made = b.op("Mul", b.op("Mul", base, base), base)
        case 0.5:
            made = b.op("Sqrt", base)
        case -0.5:
            made = b.op("Reciprocal", b.op("Sqrt", base))
        case -1:
            made = b.op("Reciprocal", base)
        case _:
            made = b.op("Pow", base, b.tensor(exponent, computing_dtype(b.dtype)))
    return b.cast(made, b.dtype)


@ELEMENTWISE.register(aten.square.default)
def square(b: Builder, x: ir.Value) -> ir.Value:
    """``x * x``."""
    return arithmetic(b, "Mul", x, x)


@ELEMENTWISE.register(aten.rsqrt.default)
def rsqrt(b: Builder, x: ir.Value) -> ir.Value:
    """``1 / sqrt(x)``."""
    return arithmetic(b, "Reciprocal", arithmetic(b, "Sqrt", x))


@ELEMENTWISE.register(aten.exp2.default)
def _exp2(b: Builder, x: ir.Value) -> ir.Value:
    return arithmetic(b, "Pow", 2.0, x)


@ELEMENTWISE.register(aten.expm1.default)
def _expm1(b: Builder, x: ir.Value) -> ir.Value:
    # 2 sinh(x/2) exp(x/2): exp(x) - 1 would lose all digits near 0.
    half = b.op("Mul", b.tensor(x, b.dtype), 0.5)
    return b.op("Mul", b.op("Mul", b.op("Sinh", half), b.op("Exp", half)), 2.0)


@ELEMENTWISE.register(aten.log1p.default)
def _log1p(b: Builder, x: ir.Value) -> ir.Value:
    # 2 atanh(x / (x + 2)): log(1 + x) would lose all digits near 0.
    value = b.tensor(x, b.dtype)
    ratio = b.op("Div", value, b.op("Add", value, 2.0))
    small = b.op("Mul", b.op("Atanh", ratio), 2.0)
    # The quotient nears 1 for large x, where the plain form is exact enough.
    return b.op(
        "Where",
        b.op("Less", b.op("Abs", value), 0.5),
        small,
        b.op("Log", b.op("Add", value, 1.0)),
    )


def _logarithm(base: float) -> Callable[..., ir.Value]:
    return lambda b, x: b.op("Mul", arithmetic(b, "Log", x), 1 / math.log(base))


ELEMENTWISE[aten.log2.default] = _logarithm(2)
ELEMENTWISE[aten.log10.default] = _logarithm(10)


@ELEMENTWISE.register(aten.erfc.default)
def _erfc(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Sub", b.constant(1, b.dtype), b.op("Erf", b.tensor(x, b.dtype)))


@ELEMENTWISE.register(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(b: Builder, start: ir.Value, end: ir.Value, weight: Operand) -> ir.Value:
    distance = b.op("Sub", end, start)
    return b.op("Add", start, b.op("Mul", distance, b.tensor(weight, b.dtype)))


@ELEMENTWISE.register(aten.addcmul.default)
def _addcmul(b: Builder, x: ir.Value, y: ir.Value, z: ir.Value, value: float = 1) -> ir.Value:
    return add(b, x, arithmetic(b, "Mul", y, z), value)


@ELEMENTWISE.register(aten.addcdiv.default)
def _addcdiv(b: Builder, x: ir.Value, y: ir.Value, z: ir.Value, value: float = 1) -> ir.Value:
    return add(b, x, arithmetic(b, "Div", y, z), value)


@ELEMENTWISE.register(
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_min.default,
    aten.clamp_min.Tensor,
    aten.hardtanh.default,
    aten.clip.default,
)
def clamp(
    b: Builder, x: ir.Value, min: Operand | None = None, max: Operand | None = None
) -> ir.Value:
    """``min(max(x, min), max)``; a bound may be missing, or be a tensor."""
    if b.node.target is aten.hardtanh.default:
        min, max = -1.0 if min is None else min, 1.0 if max is None else max
    made = x
    if min is not None:
        made = arithmetic(b, "Max", made, min)
    if max is not None:
        made = arithmetic(b, "Min", made, max)
    return b.tensor(made, b.dtype)


@ELEMENTWISE.register(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(b: Builder, x: ir.Value, bound: Operand) -> ir.Value:
    return clamp(b, x, max=bound)


@ELEMENTWISE.register(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.positive.default,
    aten.conj.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.real.default,
)
def convert(b: Builder, x: ir.Value, *rest: Any, **named: Any) -> ir.Value:
    """A tensor in the type of the result; most of these change nothing at all."""
    del rest, named
    return b.cast(x, b.dtype)


@ELEMENTWISE.register(
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default
)
def _dropout(b: Builder, x: ir.Value, p: float, train: bool) -> ir.Value:
    del b
    if train and p > 0:
        raise UnsupportedError("dropout in training mode")
    return x


@ELEMENTWISE.register(aten.copy.default)
def _copy(b: Builder, x: ir.Value, source: ir.Value, non_blocking: bool = False) -> ir.Value:
    del x, non_blocking
    return b.expand(source, b.result.shape, b.dtype)


@ELEMENTWISE.register(
    aten._assert_tensor_metadata.default,
    aten._assert_async.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)
def _check_nothing(b: Builder, *args: Any, **kwargs: Any) -> None:
    """Assertions of the trace: they compute nothing."""
    del b, args, kwargs


@ELEMENTWISE.register(aten.item.default, aten._local_scalar_dense.default)
def _item(b: Builder, x: ir.Value) -> SymbolicScalar:
    value = b.op("Reshape", x, [1])
    if is_floating(computing_dtype(value.dtype or ir.DataType.FLOAT)):
        return SymbolicScalar(b.cast(value, ir.DataType.DOUBLE))
    return SymbolicScalar(
        value if value.dtype == ir.DataType.BOOL else b.cast(value, ir.DataType.INT64)
    )


@ELEMENTWISE.register(aten.sym_size.int)
def _sym_size(b: Builder, x: ir.Value, dim: int) -> SymbolicScalar | int:
    return b.axis_size(x, b.axis(x, dim))


@ELEMENTWISE.register(aten.sym_numel.default)
def _sym_numel(b: Builder, x: ir.Value) -> SymbolicScalar:
    return SymbolicScalar(b.op("Reshape", b.op("Size", x, dtype=ir.DataType.INT64), [1]))
