"""Reductions, running sums, sorting, softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import (
    Size,
    UnsupportedError,
    computing_dtype,
    static_size,
)

aten = torch.ops.aten

REDUCTION = Table()

_INT64 = ir.DataType.INT64

Axes = int | Sequence[int] | None


def reduce(b: Builder, op_type: str, x: ir.Value, dim: Axes, keepdim: bool) -> ir.Value:
    """A reduction over some axes, or over all (None, or an empty list)."""
    axes = [dim] if isinstance(dim, int) else list(dim or ())
    return b.op(op_type, x, axes or None, keepdims=int(keepdim))


def _sum_like(op_type: str) -> Callable[..., ir.Value]:
    def translate(
        b: Builder, x: ir.Value, dim: Axes = None, keepdim: bool = False, *, dtype: Any = None
    ) -> ir.Value:
        del dtype  # that of the result
        wide = computing_dtype(b.dtype)
        return b.cast(reduce(b, op_type, b.cast(x, wide), dim, keepdim), b.dtype)

    return translate


_sum, _mean, _prod = (_sum_like(name) for name in ("ReduceSum", "ReduceMean", "ReduceProd"))
REDUCTION.update(
    {
        aten.sum.default: _sum,
        aten.sum.dim_IntList: _sum,
        aten.mean.default: _mean,
        aten.mean.dim: _mean,
        aten.prod.default: _prod,
        aten.prod.dim_int: _prod,
        aten.logsumexp.default: _sum_like("ReduceLogSumExp"),
    }
)


def _extremum(op_type: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, x: ir.Value, dim: Axes = None, keepdim: bool = False) -> ir.Value:
        wide = computing_dtype(b.dtype)
        return b.cast(reduce(b, op_type, b.cast(x, wide), dim, keepdim), b.dtype)

    return translate


_largest, _smallest = _extremum("ReduceMax"), _extremum("ReduceMin")
REDUCTION.update(
    {
        aten.amax.default: _largest,
        aten.amin.default: _smallest,
        aten.max.default: _largest,
        aten.min.default: _smallest,
    }
)


def _extremum_and_place(value_op: str, index_op: str) -> Callable[..., Sequence[ir.Value]]:
    def translate(b: Builder, x: ir.Value, dim: int, keepdim: bool = False) -> Sequence[ir.Value]:
        if b.rank(x) == 0:
            return x, b.constant(0, _INT64)
        wide = b.cast(x, computing_dtype(x.dtype or _INT64))
        value = reduce(b, value_op, wide, dim, keepdim)
        index = b.op(index_op, wide, axis=b.axis(x, dim), keepdims=int(keepdim))
        return b.cast(value, x.dtype or _INT64), index

    return translate


REDUCTION[aten.max.dim] = _extremum_and_place("ReduceMax", "ArgMax")
REDUCTION[aten.min.dim] = _extremum_and_place("ReduceMin", "ArgMin")


def _place(op_type: str) -> Callable[..., ir.Value]:
    def translate(
        b: Builder, x: ir.Value, dim: int | None = None, keepdim: bool = False
    ) -> ir.Value:
        wide = b.cast(x, computing_dtype(x.dtype or _INT64))
        if dim is None:
            index = b.op(op_type, b.op("Reshape", wide, [-1]), axis=0, keepdims=0)
            return b.reshape(index, b.result.shape) if keepdim else index
        return b.op(op_type, wide, axis=b.axis(x, dim), keepdims=int(keepdim))

    return translate


REDUCTION[aten.argmax.default] = _place("ArgMax")
REDUCTION[aten.argmin.default] = _place("ArgMin")


def _truth(op_type: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, x: ir.Value, dim: Axes = None, keepdim: bool = False) -> ir.Value:
        flags = b.cast(b.cast(x, ir.DataType.BOOL), ir.DataType.INT32)
        return b.cast(reduce(b, op_type, flags, dim, keepdim), ir.DataType.BOOL)

    return translate


_any, _all = _truth("ReduceMax"), _truth("ReduceMin")
REDUCTION.update({aten.any.default: _any, aten.any.dim: _any, aten.any.dims: _any})
REDUCTION.update({aten.all.default: _all, aten.all.dim: _all, aten.all.dims: _all})


@REDUCTION.register(aten.var.default, aten.var.dim, aten.var.correction)
def variance(
    b: Builder, x: ir.Value, dim: Any = None, unbiased: Any = None, **options: Any
) -> ir.Value:
    """Mean square distance from the mean; by default for n - 1 degrees of freedom."""
    return _spread(b, x, dim, unbiased, options)[0]


@REDUCTION.register(aten.std.default, aten.std.dim, aten.std.correction)
def _deviation(
    b: Builder, x: ir.Value, dim: Any = None, unbiased: Any = None, **options: Any
) -> ir.Value:
    return b.op("Sqrt", _spread(b, x, dim, unbiased, options)[0])


@REDUCTION.register(aten.var_mean.correction, aten.var_mean.dim)
def _variance_and_mean(
    b: Builder, x: ir.Value, dim: Any = None, unbiased: Any = None, **options: Any
) -> Sequence[ir.Value]:
    return _spread(b, x, dim, unbiased, options)


def _spread(
    b: Builder, x: ir.Value, dim: Any, unbiased: Any, options: dict[str, Any]
) -> tuple[ir.Value, ir.Value]:
    """Variance and mean; the overloads differ in where they say what."""
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, unbiased = None, dim
    unbiased = options.get("unbiased", True if unbiased is None else unbiased)
    correction = options.get("correction")
    correction = int(unbiased) if correction is None else correction
    keepdim = bool(options.get("keepdim", False))
    axes = list(range(b.rank(x))) if dim in (None, []) else [b.axis(x, i) for i in _as_list(dim)]
    mean = reduce(b, "ReduceMean", x, axes, keepdim=True)
    centred = b.op("Sub", x, mean)
    squares = b.op("Mul", centred, centred)
    flat_mean = mean if keepdim else b.op("Squeeze", mean, axes)
    if correction == 0:
        return reduce(b, "ReduceMean", squares, axes, keepdim), flat_mean
    total = reduce(b, "ReduceSum", squares, axes, keepdim)
    return b.op("Div", total, _degrees_of_freedom(b, x, axes, correction)), flat_mean


def _degrees_of_freedom(
    b: Builder, x: ir.Value, axes: Sequence[int], correction: float
) -> ir.Value | float:
    count = 1
    dynamic: list[ir.Value] = []
    for axis in axes:
        size = b.axis_size(x, axis)
        if isinstance(size, int):
            count *= size
        else:
            dynamic.append(b.scalar(size))
    if not dynamic:
        return max(count - correction, 0.0)
    dtype = x.dtype or ir.DataType.FLOAT
    product = b.constant(float(count), dtype)
    for size_value in dynamic:
        product = b.op("Mul", product, b.cast(size_value, dtype))
    return b.op("Max", b.op("Sub", product, correction), 0.0)


def _as_list(dim: int | Sequence[int]) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim)


@REDUCTION.register(aten.cumsum.default)
def cumulative_sum(b: Builder, x: ir.Value, dim: int, *, dtype: Any = None) -> ir.Value:
    """Running sums along an axis."""
    del dtype
    wide = b.cast(x, computing_dtype(b.dtype))
    if b.rank(x) == 0:
        return b.cast(wide, b.dtype)
    axis = b.constant(b.axis(x, dim), _INT64)
    return b.cast(b.op("CumSum", wide, axis), b.dtype)


@REDUCTION.register(aten.topk.default)
def _top_k(
    b: Builder, x: ir.Value, k: Size, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Sequence[ir.Value]:
    del sorted  # in order is also in any order
    return top_k(b, x, k, b.axis(x, dim), largest=largest)


@REDUCTION.register(aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
def _sort(b: Builder, x: ir.Value, *args: Any, **options: Any) -> Sequence[ir.Value] | ir.Value:
    # The overloads differ in order (`stable` may come before `dim`). TopK keeps equals in order.
    schema = b.node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments[1:]]
    given = {**dict(zip(names, args, strict=False)), **options}
    axis, down = b.axis(x, given.get("dim", -1)), bool(given.get("descending", False))
    values, places = top_k(b, x, b.axis_size(x, axis), axis, largest=down)
    is_argsort = b.node.target in (aten.argsort.default, aten.argsort.stable)
    return places if is_argsort else (values, places)


def top_k(
    b: Builder, x: ir.Value, k: Size, axis: int, *, largest: bool
) -> tuple[ir.Value, ir.Value]:
    """The ``k`` extreme values along an axis in order, and where they stood."""
    dtype = x.dtype or ir.DataType.FLOAT
    wide = b.cast(x, computing_dtype(dtype))
    count = b.shape_tensor([k])
    dtypes = [computing_dtype(dtype), _INT64]
    values, places = b.ops(
        "TopK", wide, count, outputs=2, dtypes=dtypes, axis=axis, largest=int(largest)
    )
    return b.cast(values, dtype), places


def _softmax(op_type: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, x: ir.Value, dim: int, dtype: Any = None) -> ir.Value:
        del dtype  # that of the result (or a flag for half precision)
        wide = b.cast(x, computing_dtype(b.dtype))
        return b.cast(b.op(op_type, wide, axis=b.axis(x, dim)), b.dtype)

    return translate


for _op_type, _targets in (
    ("Softmax", (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)),
    ("LogSoftmax", (aten.log_softmax.int, aten._log_softmax.default)),
):
    REDUCTION.update(dict.fromkeys(_targets, _softmax(_op_type)))


@REDUCTION.register(
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.norm.ScalarOpt_dim_dtype,
    aten.norm.Scalar,
)
def _vector_norm(
    b: Builder,
    x: ir.Value,
    ord: float | None = 2,
    dim: Axes = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> ir.Value:
    del dtype
    order = 2 if ord is None else ord
    wide = b.cast(x, b.dtype)
    if order in (1, 2):
        return reduce(b, f"ReduceL{int(order)}", wide, dim, keepdim)
    magnitude = b.op("Abs", wide)
    if math.isinf(order):
        return reduce(b, "ReduceMax" if order > 0 else "ReduceMin", magnitude, dim, keepdim)
    if order == 0:
        flags = b.cast(b.cast(magnitude, ir.DataType.BOOL), b.dtype)
        return reduce(b, "ReduceSum", flags, dim, keepdim)
    total = reduce(b, "ReduceSum", b.op("Pow", magnitude, float(order)), dim, keepdim)
    return b.op("Pow", total, 1.0 / order)


@REDUCTION.register(aten.bincount.default)
def _count_values(
    b: Builder, x: ir.Value, weights: ir.Value | None = None, minlength: int = 0
) -> ir.Value:
    length = static_size(b.result.shape[0])
    if weights is not None or length is None or length != minlength:
        raise UnsupportedError("bincount whose length depends on the data")
    hits = b.op("OneHot", x, b.constant([length], _INT64), b.constant([0, 1], _INT64), dtype=_INT64)
    return b.op("ReduceSum", hits, [0], keepdims=0)


@REDUCTION.register(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def _count_nonzero(b: Builder, x: ir.Value, dim: Axes = None) -> ir.Value:
    flags = b.cast(b.cast(x, ir.DataType.BOOL), _INT64)
    return reduce(b, "ReduceSum", flags, dim, keepdim=False)
