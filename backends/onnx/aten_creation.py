"""Tensors that come from numbers and sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import (
    Axis,
    Number,
    Operand,
    SymbolicScalar,
    UnsupportedError,
    is_floating,
    static_shape,
)

aten = torch.ops.aten

CREATION = Table()

_STORED_ELEMENTS = 4096
"""Constants up to this size are stored; larger ones are computed."""


def full(b: Builder, shape: Sequence[Axis], value: Operand, dtype: ir.DataType) -> ir.Value:
    """A tensor of one value."""
    sizes = static_shape(shape)
    small = sizes is not None and int(np.prod(sizes)) <= _STORED_ELEMENTS
    if isinstance(value, (bool, int, float)) and sizes is not None and small:
        return b.constant(np.full(sizes, value), dtype)
    return b.op("Expand", b.tensor(value, dtype), b.sizes(shape))


@CREATION.register(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    # Contents of empty tensors are nobody's business; zeros are at least the same every time.
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
)
def _zeros(b: Builder, *args: Any, **kwargs: Any) -> ir.Value:
    del args, kwargs
    return full(b, b.result.shape, 0, b.dtype)


@CREATION.register(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(b: Builder, *args: Any, **kwargs: Any) -> ir.Value:
    del args, kwargs
    return full(b, b.result.shape, 1, b.dtype)


@CREATION.register(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(b: Builder, like: Any, *args: Any, **kwargs: Any) -> ir.Value:
    del like
    # full(size, value), full_like(x, value), new_full(x, size, value)
    value = kwargs["fill_value"] if "fill_value" in kwargs else args[-1]
    return full(b, b.result.shape, value, b.dtype)


@CREATION.register(aten.fill.Scalar, aten.fill.Tensor)
def _fill(b: Builder, x: ir.Value, value: Operand) -> ir.Value:
    del x
    return full(b, b.result.shape, value, b.dtype)


@CREATION.register(aten.scalar_tensor.default)
def _scalar_tensor(b: Builder, value: Number, **kwargs: Any) -> ir.Value:
    del kwargs
    return b.tensor(value, b.dtype)


@CREATION.register(aten.arange.default)
def _arange(b: Builder, end: Number, **kwargs: Any) -> ir.Value:
    return arange(b, 0, end, 1, **kwargs)


@CREATION.register(aten.arange.start, aten.arange.start_step)
def arange(b: Builder, start: Number, end: Number, step: Number = 1, **kwargs: Any) -> ir.Value:
    """``start, start + step, ...`` before ``end``."""
    del kwargs
    dtype = b.dtype
    sizes = static_shape(b.result.shape)
    numbers = [start, end, step]
    known = [x for x in numbers if not isinstance(x, SymbolicScalar)]
    if sizes is not None and len(known) == 3 and sizes[0] <= _STORED_ELEMENTS:
        return b.constant(known[0] + np.arange(sizes[0]) * known[2], dtype)
    whole = all(
        isinstance(x, int) or (isinstance(x, SymbolicScalar) and x.value.dtype == ir.DataType.INT64)
        for x in numbers
    )
    counting = ir.DataType.INT64 if whole else ir.DataType.DOUBLE
    return b.cast(b.op("Range", *(b.tensor(x, counting) for x in numbers)), dtype)


@CREATION.register(aten.linspace.default)
def _linspace(b: Builder, start: Number, end: Number, steps: int, **kwargs: Any) -> ir.Value:
    del kwargs
    if isinstance(start, SymbolicScalar) or isinstance(end, SymbolicScalar):
        raise UnsupportedError("linspace between sizes")
    dtype = torch.float64 if is_floating(b.dtype) else b.result.dtype
    return b.constant(torch.linspace(start, end, steps, dtype=dtype).numpy(), b.dtype)


@CREATION.register(aten.eye.default, aten.eye.m)
def _eye(b: Builder, *args: Any, **kwargs: Any) -> ir.Value:
    del args, kwargs
    zeros = full(b, b.result.shape, 0, b.dtype)
    sizes = static_shape(b.result.shape)
    if sizes is not None and int(np.prod(sizes)) <= _STORED_ELEMENTS:
        return b.constant(np.eye(sizes[0], sizes[1]), b.dtype)
    return b.op("EyeLike", zeros)


@CREATION.register(aten.tril_indices.default, aten.triu_indices.default)
def _triangle_indices(
    b: Builder, rows: int, columns: int, offset: int = 0, **kwargs: Any
) -> ir.Value:
    del kwargs
    upper = b.node.target is aten.triu_indices.default
    indices = (
        np.triu_indices(rows, offset, columns) if upper else np.tril_indices(rows, offset, columns)
    )
    return b.constant(np.stack(indices), b.dtype)
