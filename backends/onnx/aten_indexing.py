"""Gathering and scattering by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompile.backends.onnx.aten_logic import where
from qcompile.backends.onnx.aten_shape import transpose
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import (
    Axis,
    Operand,
    UnsupportedError,
    computing_dtype,
    same_size,
    static_shape,
    static_size,
)

aten = torch.ops.aten

INDEXING = Table()

_BOOL, _INT64 = ir.DataType.BOOL, ir.DataType.INT64


@INDEXING.register(aten.embedding.default)
def embedding(b: Builder, table: ir.Value, ids: ir.Value, *rest: Any, **named: Any) -> ir.Value:
    """Rows of a table."""
    del rest, named  # padding index, gradients: they matter in training only
    return b.op("Gather", table, ids, axis=0)


@INDEXING.register(aten.index_select.default)
def _index_select(b: Builder, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    if b.rank(x) == 0:
        return x
    return b.op(
        "Gather", x, b.reshape(index, [-1]) if b.rank(index) == 0 else index, axis=b.axis(x, dim)
    )


@INDEXING.register(aten.gather.default, aten.take_along_dim.default)
def _gather(b: Builder, x: ir.Value, dim: Any, index: Any, sparse_grad: bool = False) -> ir.Value:
    del sparse_grad
    if b.node.target is aten.take_along_dim.default:
        dim, index = index, dim
        shape = [*b.result.shape]
        index = b.expand(index, shape, _INT64)
        axis = b.axis(x, dim)
        shape[axis] = b.shape(x)[axis]
        x = b.expand(x, shape, b.dtype)
        return b.op("GatherElements", x, index, axis=axis)
    if b.rank(x) == 0:
        return x
    return b.op("GatherElements", x, b.cast(index, _INT64), axis=b.axis(x, dim))


@INDEXING.register(aten.nonzero.default)
def nonzero(b: Builder, x: ir.Value) -> ir.Value:
    """Positions of the elements that are not zero, ``[n, rank]``."""
    return b.op("Transpose", b.op("NonZero", x), perm=[1, 0])


@INDEXING.register(aten.nonzero_numpy.default)
def _nonzero_parts(b: Builder, x: ir.Value) -> list[ir.Value]:
    found = b.op("NonZero", x)
    return [b.op("Gather", found, b.constant(i, _INT64), axis=0) for i in range(b.rank(x))]


@INDEXING.register(aten.masked_select.default)
def _masked_select(b: Builder, x: ir.Value, mask: ir.Value) -> ir.Value:
    if not _same(b.shape(x), b.shape(mask)):
        raise UnsupportedError("masked_select with broadcasting")
    flat, chosen = b.op("Reshape", x, [-1]), b.op("Reshape", mask, [-1])
    return b.op("Compress", flat, chosen, axis=0)


@INDEXING.register(aten.index.Tensor)
def _index(b: Builder, x: ir.Value, indices: Sequence[ir.Value | None]) -> ir.Value:
    places, tuples, where_to = _index_tuples(b, indices)
    if len(places) == 1 and (only := indices[places[0]]) is not None and only.dtype != _BOOL:
        return b.op("Gather", x, only, axis=places[0])
    rest = [axis for axis in range(b.rank(x)) if axis not in places]
    picked = b.op("GatherND", transpose(b, x, [*places, *rest]), tuples)
    # GatherND leaves the axes of the index in front; torch puts them where the indices stood,
    # unless something stood between these.
    count = b.result.dim() - len(rest)
    order = [
        *range(count, count + where_to),
        *range(count),
        *range(count + where_to, b.result.dim()),
    ]
    return transpose(b, picked, order)


@INDEXING.register(
    aten.index_put.default, aten._unsafe_index_put.default, aten._index_put_impl.default
)
def _index_put(
    b: Builder,
    x: ir.Value,
    indices: Sequence[ir.Value | None],
    values: ir.Value,
    accumulate: bool = False,
    unsafe: bool = False,
) -> ir.Value:
    del unsafe
    mask = indices[0]
    single = static_shape(b.shape(values)) in ((), (1,))
    if len(indices) == 1 and mask is not None and mask.dtype == _BOOL and single:
        if accumulate:
            raise UnsupportedError("index_put that adds under a mask")
        extra = list(range(b.rank(mask), b.rank(x)))
        wide = b.op("Unsqueeze", mask, extra) if extra else mask
        return where(b, wide, b.op("Reshape", values, [1]), x, b.dtype)
    places, tuples, where_to = _index_tuples(b, indices)
    if where_to != 0 and b.rank(values) > 0:
        raise UnsupportedError("index_put whose indices do not begin at the first axis")
    rest = [axis for axis in range(b.rank(x)) if axis not in places]
    order = [*places, *rest]
    fronted = transpose(b, x, order)
    leading = b.op("Slice", b.op("Shape", tuples), [0], [-1])
    trailing = b.op("Shape", fronted, start=len(places))
    updates = b.op("Expand", b.cast(values, b.dtype), b.op("Concat", leading, trailing, axis=0))
    reduction = "add" if accumulate else None
    made = b.op("ScatterND", fronted, tuples, updates, reduction=reduction)
    return transpose(b, made, [order.index(axis) for axis in range(len(order))])


def _index_tuples(
    b: Builder, indices: Sequence[ir.Value | None]
) -> tuple[list[int], ir.Value, int]:
    """What ``x[indices]`` reads.

    Returns:
        The axes that are indexed; the positions along them, ``[..., axes]``; and before which of
        the other axes the axes of the index go.
    """
    places: list[int] = []
    parts: list[ir.Value] = []
    shapes: list[tuple[Axis, ...]] = []
    masks = 0
    axis = 0
    for index in indices:
        if index is None:
            axis += 1
            continue
        if index.dtype in (_BOOL, ir.DataType.UINT8):
            masks += 1
            rank = b.rank(index)
            found = b.op("NonZero", index)
            rows = b.ops("Split", found, outputs=rank, axis=0, num_outputs=rank)
            parts += [b.op("Reshape", row, [-1]) for row in rows]
            places += range(axis, axis + rank)
            axis += rank
        else:
            parts.append(b.cast(index, _INT64))
            shapes.append(b.shape(index))
            places.append(axis)
            axis += 1
    if masks > 1 or (masks and shapes):
        raise UnsupportedError("an index by several masks, or by masks and positions")
    if shapes:
        parts = _broadcast(b, parts, shapes)
    together = places == list(range(places[0], places[0] + len(places)))
    tuples = [b.op("Unsqueeze", part, [-1]) for part in parts]
    joined = tuples[0] if len(tuples) == 1 else b.op("Concat", *tuples, axis=-1)
    return places, joined, places[0] if together else 0


def _broadcast(
    b: Builder, parts: Sequence[ir.Value], shapes: Sequence[tuple[Axis, ...]]
) -> list[ir.Value]:
    rank = max(map(len, shapes))
    if all(_same(shape, shapes[0]) for shape in shapes):
        return list(parts)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    common = [
        next((size for size in sizes if static_size(size) != 1), 1)
        for sizes in zip(*padded, strict=True)
    ]
    return [b.expand(part, common, _INT64) for part in parts]


def _same(a: Sequence[Axis], b: Sequence[Axis]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


@INDEXING.register(aten.scatter.src, aten.scatter.value, aten.scatter.reduce)
def _scatter(
    b: Builder, x: ir.Value, dim: int, index: ir.Value, source: Operand, reduce: str | None = None
) -> ir.Value:
    reduction = {None: None, "add": "add", "multiply": "mul"}[reduce]
    return scatter(b, x, dim, index, source, reduction)


@INDEXING.register(aten.scatter_add.default)
def _scatter_add(b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value) -> ir.Value:
    return scatter(b, x, dim, index, source, "add")


@INDEXING.register(aten.scatter_reduce.two)
def _scatter_reduce(
    b: Builder,
    x: ir.Value,
    dim: int,
    index: ir.Value,
    source: ir.Value,
    reduce: str,
    include_self: bool = True,
) -> ir.Value:
    known = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min"}
    if reduce not in known or not include_self:
        raise UnsupportedError(f"scatter_reduce '{reduce}' with include_self={include_self}")
    return scatter(b, x, dim, index, source, known[reduce])


def scatter(
    b: Builder, x: ir.Value, dim: int, index: ir.Value, source: Operand, reduction: str | None
) -> ir.Value:
    """Writes ``source`` into ``x`` at positions along one axis."""
    wide = computing_dtype(b.dtype)
    if not isinstance(source, ir.Value):
        updates = b.expand(source, b.shape(index), wide)
    else:
        updates = b.cast(source, wide)
        if not _same(b.shape(source), b.shape(index)):
            # torch reads only as much of the source as the index covers
            ends, axes = b.op("Shape", index), list(range(b.rank(index)))
            updates = b.op("Slice", updates, [0] * b.rank(index), ends, axes)
    axis = b.axis(x, dim)
    made = b.op(
        "ScatterElements",
        b.cast(x, wide),
        b.cast(index, _INT64),
        updates,
        axis=axis,
        reduction=reduction,
    )
    return b.cast(made, b.dtype)


@INDEXING.register(aten.index_add.default)
def _index_add(
    b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value, alpha: float = 1
) -> ir.Value:
    scaled = source if alpha == 1 else b.op("Mul", source, alpha)
    return _write_rows(b, x, dim, index, scaled, "add")


@INDEXING.register(aten.index_copy.default)
def _index_copy(b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value) -> ir.Value:
    return _write_rows(b, x, dim, index, source, None)


@INDEXING.register(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(b: Builder, x: ir.Value, dim: int, index: ir.Value, value: Operand) -> ir.Value:
    axis = b.axis(x, dim)
    shape = [*b.shape(x)]
    shape[axis] = b.shape(index)[0]
    return _write_rows(b, x, dim, index, b.expand(value, shape, b.dtype), None)


def _write_rows(
    b: Builder, x: ir.Value, dim: int, index: ir.Value, source: ir.Value, reduction: str | None
) -> ir.Value:
    axis = b.axis(x, dim)
    order = [axis, *(i for i in range(b.rank(x)) if i != axis)]
    rows = b.op("Unsqueeze", b.cast(index, _INT64), [-1])
    made = b.op(
        "ScatterND", transpose(b, x, order), rows, transpose(b, source, order), reduction=reduction
    )
    return transpose(b, made, [order.index(i) for i in range(len(order))])


@INDEXING.register(aten.one_hot.default)
def _one_hot(b: Builder, x: ir.Value, num_classes: int = -1) -> ir.Value:
    if num_classes < 0:
        raise UnsupportedError("one_hot whose number of classes depends on the data")
    depth = b.constant([num_classes], _INT64)
    return b.op("OneHot", x, depth, b.constant([0, 1], _INT64), dtype=_INT64, axis=-1)
