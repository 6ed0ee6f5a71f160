"""Views, and everything else that moves elements without looking at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompile.backends.onnx import sizes as size_arithmetic
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import (
    Size,
    SymbolicScalar,
    UnsupportedError,
    is_floating,
)

aten = torch.ops.aten

SHAPE = Table()

_INDEX_LIMIT = 2**63 - 1


@SHAPE.register(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.ravel.default,
)
def reshape(b: Builder, x: ir.Value, *rest: Any, **named: Any) -> ir.Value:
    """The same elements in the same order, in the shape of the result."""
    del rest, named
    return b.reshape(x, b.result.shape)


def transpose(b: Builder, x: ir.Value, permutation: Sequence[int]) -> ir.Value:
    """A tensor with its axes in another order."""
    if list(permutation) == sorted(permutation):
        return x
    return b.op("Transpose", x, perm=list(permutation))


@SHAPE.register(aten.permute.default)
def _permute(b: Builder, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    return transpose(b, x, [b.axis(x, dim) for dim in dims])


@SHAPE.register(
    aten.transpose.int, aten.transpose_copy.int, aten.swapaxes.default, aten.swapdims.default
)
def swap_axes(b: Builder, x: ir.Value, dim0: int, dim1: int) -> ir.Value:
    """A tensor with two axes exchanged."""
    order = list(range(b.rank(x)))
    i, j = b.axis(x, dim0), b.axis(x, dim1)
    if order:
        order[i], order[j] = order[j], order[i]
    return transpose(b, x, order)


@SHAPE.register(
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.adjoint.default,
    aten.matrix_H.default,
)
def _turn(b: Builder, x: ir.Value) -> ir.Value:
    if b.rank(x) < 2:
        return x
    if b.node.target is aten.numpy_T.default:
        return transpose(b, x, list(reversed(range(b.rank(x)))))
    return swap_axes(b, x, -2, -1)


@SHAPE.register(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def _move_axes(
    b: Builder, x: ir.Value, source: int | Sequence[int], target: int | Sequence[int]
) -> ir.Value:
    sources = [source] if isinstance(source, int) else source
    targets = [target] if isinstance(target, int) else target
    moved = {b.axis(x, t): b.axis(x, s) for s, t in zip(sources, targets, strict=True)}
    rest = iter(i for i in range(b.rank(x)) if i not in moved.values())
    return transpose(b, x, [moved[i] if i in moved else next(rest) for i in range(b.rank(x))])


@SHAPE.register(
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.expand_copy.default,
)
def _expand(b: Builder, x: ir.Value, *rest: Any, **named: Any) -> ir.Value:
    del rest, named
    return b.expand(x, b.result.shape, b.dtype)


@SHAPE.register(aten.broadcast_tensors.default, aten.meshgrid.default, aten.meshgrid.indexing)
def _broadcast_tensors(
    b: Builder, tensors: Sequence[ir.Value], indexing: str = "ij"
) -> list[ir.Value]:
    if b.node.target is aten.broadcast_tensors.default:
        pairs = zip(tensors, b.results, strict=True)
        return [b.expand(x, fake.shape, x.dtype or b.dtype) for x, fake in pairs]
    made = []
    for i, (x, fake) in enumerate(zip(tensors, b.results, strict=True)):
        axis = 1 - i if indexing == "xy" and i < 2 else i
        lined = b.op("Unsqueeze", x, [j for j in range(fake.dim()) if j != axis])
        sizes = [1 if j == axis else b.size(size) for j, size in enumerate(fake.shape)]
        made.append(b.op("Expand", lined, sizes))
    return made


@SHAPE.register(aten.repeat.default, aten.tile.default)
def _repeat(b: Builder, x: ir.Value, repeats: Sequence[Size]) -> ir.Value:
    rank = max(len(repeats), b.rank(x))
    padded = [1] * (rank - len(repeats)) + list(repeats)
    if rank > b.rank(x):
        x = b.op("Unsqueeze", x, list(range(rank - b.rank(x))))
    return x if all(count == 1 for count in padded) else b.op("Tile", x, padded)


@SHAPE.register(aten.repeat_interleave.self_int)
def _repeat_each(
    b: Builder, x: ir.Value, repeats: Size, dim: int | None = None, output_size: Any = None
) -> ir.Value:
    del output_size
    if dim is None:
        x, axis, rank = b.op("Reshape", x, [-1]), 0, 1
    else:
        axis, rank = b.axis(x, dim), b.rank(x)
    counts: list[Size] = [1] * (rank + 1)
    counts[axis + 1] = repeats
    spread = b.op("Expand", b.op("Unsqueeze", x, [axis + 1]), counts)
    return b.reshape(spread, b.result.shape)


@SHAPE.register(aten.cat.default, aten.concat.default, aten.concatenate.default)
def _concatenate(b: Builder, tensors: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    # An old rule of torch: empty vectors join tensors of any rank.
    rank = b.result.dim()
    kept = [x for x in tensors if b.rank(x) == rank]
    values = [b.cast(x, b.dtype) for x in kept]
    return values[0] if len(values) == 1 else b.op("Concat", *values, axis=dim % rank)


@SHAPE.register(aten.stack.default)
def _stack(b: Builder, tensors: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    axis = dim % b.result.dim()
    values = [b.op("Unsqueeze", b.cast(x, b.dtype), [axis]) for x in tensors]
    return values[0] if len(values) == 1 else b.op("Concat", *values, axis=axis)


@SHAPE.register(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default,
    aten.chunk.default,
    aten.unsafe_chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
)
def _split(b: Builder, x: ir.Value, how: Any, dim: int = 0) -> Sequence[ir.Value]:
    del how  # the shapes of the results say it
    axis = b.axis(x, dim)
    parts = [b.size(fake.shape[axis]) for fake in b.results]
    return b.ops("Split", x, parts, outputs=len(parts), axis=axis) if len(parts) > 1 else [x]


@SHAPE.register(aten.unbind.int)
def _unbind(b: Builder, x: ir.Value, dim: int = 0) -> Sequence[ir.Value]:
    axis = b.axis(x, dim)
    return [
        b.op("Gather", x, b.constant(i, ir.DataType.INT64), axis=axis)
        for i in range(len(b.results))
    ]


@SHAPE.register(aten.slice.Tensor, aten.slice_copy.Tensor)
def _slice(
    b: Builder,
    x: ir.Value,
    dim: int = 0,
    start: Size | None = None,
    end: Size | None = None,
    step: int = 1,
) -> ir.Value:
    whole = end is None or (isinstance(end, int) and end >= _INDEX_LIMIT)
    if start in (None, 0) and whole and step == 1:
        return x
    return b.slice(x, b.axis(x, dim), 0 if start is None else start, end, step)


@SHAPE.register(aten.narrow.default)
def _narrow(b: Builder, x: ir.Value, dim: int, start: Size, length: Size) -> ir.Value:
    end = size_arithmetic.add(b, start, length)
    if isinstance(end, int) and end == 0:  # the last ones, counted from the end
        end = None  # type: ignore[assignment]
    return b.slice(x, b.axis(x, dim), start, end)


@SHAPE.register(aten.select.int, aten.select_copy.int)
def _select(b: Builder, x: ir.Value, dim: int, index: Size) -> ir.Value:
    position = b.tensor(index, ir.DataType.INT64)
    return b.op("Gather", x, position, axis=b.axis(x, dim))


@SHAPE.register(aten.slice_scatter.default)
def _slice_scatter(
    b: Builder,
    x: ir.Value,
    source: ir.Value,
    dim: int = 0,
    start: Size | None = None,
    end: Size | None = None,
    step: int = 1,
) -> ir.Value:
    axis = b.axis(x, dim)
    length = b.axis_size(x, axis)
    every = b.op("Range", *(b.tensor(n, ir.DataType.INT64) for n in (0, length, 1)))
    chosen = b.slice(every, 0, 0 if start is None else start, end, step)
    order = [axis, *(i for i in range(b.rank(x)) if i != axis)]
    fronted, rows = transpose(b, x, order), transpose(b, b.cast(source, b.dtype), order)
    made = b.op("ScatterND", fronted, b.op("Unsqueeze", chosen, [-1]), rows)
    return transpose(b, made, [order.index(i) for i in range(len(order))])


@SHAPE.register(aten.select_scatter.default)
def _select_scatter(b: Builder, x: ir.Value, source: ir.Value, dim: int, index: Size) -> ir.Value:
    axis = b.axis(x, dim)
    following = size_arithmetic.add(b, index, 1)
    end = None if following == 0 else following
    row = b.op("Unsqueeze", source, [axis])
    return _slice_scatter(b, x, row, axis, index, end)  # type: ignore[arg-type]


@SHAPE.register(aten.roll.default)
def _roll(
    b: Builder, x: ir.Value, shifts: Size | Sequence[Size], dims: int | Sequence[int] = ()
) -> ir.Value:
    steps = shifts if isinstance(shifts, Sequence) else [shifts]
    axes = dims if isinstance(dims, Sequence) else [dims]
    if not axes:
        made = _rolled(b, b.op("Reshape", x, [-1]), 0, steps[0])
        return b.reshape(made, b.result.shape)
    for step, dim in zip(steps, axes, strict=True):
        x = _rolled(b, x, dim % b.result.dim(), step)
    return x


def _rolled(b: Builder, x: ir.Value, axis: int, shift: Size) -> ir.Value:
    # A shift of more than the length goes round, and one of 0 must not give an empty half.
    length = b.op("Shape", x, start=axis, end=axis + 1)
    cut = size_arithmetic.negate(b, shift)
    start = SymbolicScalar(b.op("Mod", b.shape_tensor([cut]), length))
    return b.op("Concat", b.slice(x, axis, start), b.slice(x, axis, 0, start), axis=axis)


@SHAPE.register(aten.flip.default)
def _flip(b: Builder, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    axes = [b.axis(x, dim) for dim in dims]
    count = len(axes)
    ends, steps = [-_INDEX_LIMIT] * count, [-1] * count
    return b.op("Slice", x, [-1] * count, ends, axes, steps) if axes else x


@SHAPE.register(aten.constant_pad_nd.default)
def _pad_constant(b: Builder, x: ir.Value, pad: Sequence[Size], value: float = 0) -> ir.Value:
    return _pad(b, x, pad, "constant", value)


@SHAPE.register(aten.pad.default)
def _pad(
    b: Builder,
    x: ir.Value,
    pad: Sequence[Size],
    mode: str = "constant",
    value: float | None = None,
) -> ir.Value:
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    # torch lists (before, after) from the last axis on; ONNX all befores, then all afters.
    axes = [b.rank(x) - 1 - i for i in range(len(pad) // 2)]
    amounts = [*pad[0::2], *pad[1::2]]
    fill = b.constant(value or 0, b.dtype) if mode == "constant" else None
    return b.op("Pad", x, amounts, fill, axes, mode=modes[mode])


@SHAPE.register(
    aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default
)
def _pad_reflect(b: Builder, x: ir.Value, pad: Sequence[Size]) -> ir.Value:
    return _pad(b, x, pad, "reflect")


@SHAPE.register(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)
def _pad_replicate(b: Builder, x: ir.Value, pad: Sequence[Size]) -> ir.Value:
    return _pad(b, x, pad, "replicate")


@SHAPE.register(aten.tril.default)
def _tril(b: Builder, x: ir.Value, diagonal: Size = 0) -> ir.Value:
    return _triangle(b, x, diagonal, upper=False)


@SHAPE.register(aten.triu.default)
def _triu(b: Builder, x: ir.Value, diagonal: Size = 0) -> ir.Value:
    return _triangle(b, x, diagonal, upper=True)


def _triangle(b: Builder, x: ir.Value, diagonal: Size, *, upper: bool) -> ir.Value:
    plain = b.dtype in (ir.DataType.BOOL, ir.DataType.INT64) or is_floating(b.dtype)
    wide = b.dtype if plain else ir.DataType.INT64
    offset = b.tensor(diagonal, ir.DataType.INT64)
    return b.cast(b.op("Trilu", b.cast(x, wide), offset, upper=int(upper)), b.dtype)


@SHAPE.register(aten.unfold.default)
def _unfold(b: Builder, x: ir.Value, dim: int, size: int, step: int) -> ir.Value:
    axis = b.axis(x, dim)
    count = b.size(b.result.shape[axis])
    starts = b.op("Range", *(b.tensor(n, ir.DataType.INT64) for n in (0, count, 1)))
    within = b.constant(list(range(size)), ir.DataType.INT64)
    index = b.op("Add", b.op("Unsqueeze", b.op("Mul", starts, step), [1]), within)
    windows = b.op("Gather", x, index, axis=axis)  # the window follows its position: move it last
    rank = b.rank(x) + 1
    return transpose(b, windows, [i for i in range(rank) if i != axis + 1] + [axis + 1])


@SHAPE.register(aten.pixel_shuffle.default)
def _pixel_shuffle(b: Builder, x: ir.Value, factor: int) -> ir.Value:
    if b.rank(x) != 4:
        raise UnsupportedError("pixel_shuffle of a tensor that is not [N, C, H, W]")
    return b.op("DepthToSpace", x, blocksize=factor, mode="CRD")


@SHAPE.register(aten.pixel_unshuffle.default)
def _pixel_unshuffle(b: Builder, x: ir.Value, factor: int) -> ir.Value:
    rank = b.rank(x)
    if rank != 4:
        raise UnsupportedError("pixel_unshuffle of a tensor that is not [N, C, H, W]")
    height, width = b.sizes(b.result.shape[-2:])
    channels = b.sizes(b.shape(x)[:-2])
    blocks = b.op("Reshape", x, [*channels, height, factor, width, factor])
    return b.reshape(transpose(b, blocks, [0, 1, 3, 5, 2, 4]), b.result.shape)


@SHAPE.register(aten.diagonal.default)
def _diagonal(b: Builder, x: ir.Value, offset: int = 0, dim1: int = 0, dim2: int = 1) -> ir.Value:
    i, j = b.axis(x, dim1), b.axis(x, dim2)
    rest = [k for k in range(b.rank(x)) if k not in (i, j)]
    length = b.size(b.result.shape[-1])
    steps = b.op("Range", *(b.tensor(n, ir.DataType.INT64) for n in (0, length, 1)))
    rows = b.op("Add", steps, max(-offset, 0))
    columns = b.op("Add", steps, max(offset, 0))
    index = b.op("Concat", *(b.op("Unsqueeze", k, [1]) for k in (rows, columns)), axis=1)
    picked = b.op("GatherND", transpose(b, x, [i, j, *rest]), index)
    return transpose(b, picked, [*range(1, len(rest) + 1), 0])
