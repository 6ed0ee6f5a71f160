"""Arithmetic on sizes: in Python where all are known, as int64 nodes where they are not."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import sympy
import torch
from torch.utils._sympy import functions as torch_sympy

from qcompile.backends.onnx.values import Number, Size, SymbolicScalar, UnsupportedError

if TYPE_CHECKING:
    from qcompile.backends.onnx.builder import Builder

_INT, _FLOAT, _BOOL = ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.BOOL


def _values(b: Builder, *operands: Number) -> list[ir.Value]:
    """Operands as ``[1]`` tensors of one type."""
    kinds = [x.value.dtype if isinstance(x, SymbolicScalar) else _kind(x) for x in operands]
    wide = _FLOAT if _FLOAT in kinds else _INT
    return [
        b.cast(x.value, wide) if isinstance(x, SymbolicScalar) else b.constant([x], wide)
        for x in operands
    ]


def _kind(x: bool | int | float) -> ir.DataType:
    return _FLOAT if isinstance(x, float) else _INT


def _arithmetic(op_type: str, fold: Callable[..., Any]) -> Callable[..., Number]:
    def translate(b: Builder, *operands: Number) -> Number:
        if not any(isinstance(x, SymbolicScalar) for x in operands):
            return fold(*operands)  # type: ignore[no-any-return]
        return SymbolicScalar(b.op(op_type, *_values(b, *operands)))

    return translate


add = _arithmetic("Add", operator.add)
subtract = _arithmetic("Sub", operator.sub)
multiply = _arithmetic("Mul", operator.mul)
negate = _arithmetic("Neg", operator.neg)
power = _arithmetic("Pow", operator.pow)
modulo = _arithmetic("Mod", operator.mod)  # without fmod: the sign of the divisor, as in Python
maximum = _arithmetic("Max", max)
minimum = _arithmetic("Min", min)
absolute = _arithmetic("Abs", abs)


def floor_divide(b: Builder, x: Number, y: Number) -> Number:
    """``x // y``; ONNX divides integers towards zero, Python downwards."""
    if not isinstance(x, SymbolicScalar) and not isinstance(y, SymbolicScalar):
        return x // y
    dividend, divisor = _values(b, x, y)
    if dividend.dtype == _FLOAT:
        return SymbolicScalar(b.op("Floor", b.op("Div", dividend, divisor)))
    whole = b.op("Sub", dividend, b.op("Mod", dividend, divisor))
    return SymbolicScalar(b.op("Div", whole, divisor))


def true_divide(b: Builder, x: Number, y: Number) -> Number:
    """``x / y``, a double."""
    if not isinstance(x, SymbolicScalar) and not isinstance(y, SymbolicScalar):
        return x / y
    dividend, divisor = (b.cast(value, _FLOAT) for value in _values(b, x, y))
    return SymbolicScalar(b.op("Div", dividend, divisor))


def _to_float(b: Builder, x: Number) -> Number:
    return SymbolicScalar(b.cast(x.value, _FLOAT)) if isinstance(x, SymbolicScalar) else float(x)


def _rounded(op_type: str | None, fold: Callable[[float], int]) -> Callable[..., Number]:
    def translate(b: Builder, x: Number) -> Number:
        if not isinstance(x, SymbolicScalar):
            return fold(x)
        if x.value.dtype == _INT:
            return x
        rounded = x.value if op_type is None else b.op(op_type, x.value)
        return SymbolicScalar(b.cast(rounded, _INT))

    return translate


def _comparison(op_type: str, fold: Callable[..., bool]) -> Callable[..., Number]:
    def translate(b: Builder, x: Number, y: Number) -> Number:
        if not isinstance(x, SymbolicScalar) and not isinstance(y, SymbolicScalar):
            return fold(x, y)
        return SymbolicScalar(b.op(op_type, *_values(b, x, y)))

    return translate


_equal = _comparison("Equal", operator.eq)


def _not(b: Builder, x: Number) -> Number:
    return SymbolicScalar(b.op("Not", x.value)) if isinstance(x, SymbolicScalar) else not x


def _not_equal(b: Builder, x: Number, y: Number) -> Number:
    return _not(b, _equal(b, x, y))


def _logical(op_type: str, fold: Callable[..., Any]) -> Callable[..., Number]:
    def translate(b: Builder, x: Number, y: Number) -> Number:
        if not isinstance(x, SymbolicScalar) and not isinstance(y, SymbolicScalar):
            return fold(x, y)  # type: ignore[no-any-return]
        values = (b.cast(value, _BOOL) for value in _values(b, x, y))
        return SymbolicScalar(b.op(op_type, *values))

    return translate


def _if_then_else(b: Builder, condition: Number, x: Number, y: Number) -> Number:
    if not isinstance(condition, SymbolicScalar):
        return x if condition else y
    return SymbolicScalar(b.op("Where", condition.value, *_values(b, x, y)))


def _sum(b: Builder, terms: list[Number]) -> Number:
    total: Number = 0
    for term in terms:
        total = add(b, total, term)
    return total


PYTHON: Mapping[Callable[..., Any], Callable[..., Number]] = {
    operator.add: add,
    operator.sub: subtract,
    operator.mul: multiply,
    operator.neg: negate,
    operator.pow: power,
    operator.mod: modulo,
    operator.floordiv: floor_divide,
    operator.truediv: true_divide,
    operator.eq: _equal,
    operator.ne: _not_equal,
    operator.lt: _comparison("Less", operator.lt),
    operator.le: _comparison("LessOrEqual", operator.le),
    operator.gt: _comparison("Greater", operator.gt),
    operator.ge: _comparison("GreaterOrEqual", operator.ge),
    operator.and_: _logical("And", operator.and_),
    operator.or_: _logical("Or", operator.or_),
    operator.not_: _not,
    operator.abs: absolute,
    math.floor: _rounded("Floor", math.floor),
    math.ceil: _rounded("Ceil", math.ceil),
    math.trunc: _rounded(None, math.trunc),
    round: _rounded("Round", round),
    torch.sym_max: maximum,
    torch.sym_min: minimum,
    torch.sym_not: _not,
    torch.sym_ite: _if_then_else,
    torch.sym_int: _rounded(None, int),
    torch.sym_float: _to_float,
    torch.sym_sum: _sum,
}
"""Translations of the Python arithmetic that may stand between operators."""


def evaluate(b: Builder, expr: sympy.Expr, symbol: Callable[[sympy.Symbol], Size]) -> Size:
    """A size from its expression over the program's symbols.

    Args:
        b: Where nodes go.
        expr: What a symbolic size knows itself as.
        symbol: Finds the value of a symbol.

    Raises:
        UnsupportedError: If the expression has a function that no node computes.
    """

    def fold(function: Callable[..., Number], *arguments: sympy.Expr) -> Number:
        total: Number = evaluate(b, arguments[0], symbol)
        for argument in arguments[1:]:
            total = function(b, total, evaluate(b, argument, symbol))
        return total

    if expr.is_Integer:
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return symbol(expr)
    for kinds, function in _FUNCTIONS:
        if isinstance(expr, kinds):
            return _as_size(fold(function, *expr.args))
    raise UnsupportedError(f"the size {expr} cannot be computed from the inputs' sizes")


def _as_size(x: Number) -> Size:
    return x if isinstance(x, SymbolicScalar) else int(x)


_FUNCTIONS: tuple[tuple[tuple[Any, ...], Callable[..., Number]], ...] = (
    ((sympy.Add,), add),
    ((sympy.Mul,), multiply),
    ((sympy.Pow, torch_sympy.PowByNatural), power),
    ((torch_sympy.FloorDiv, torch_sympy.CleanDiv), floor_divide),
    ((torch_sympy.Mod, torch_sympy.PythonMod), modulo),
    ((sympy.Max, torch_sympy.Max), maximum),
    ((sympy.Min, torch_sympy.Min), minimum),
)
