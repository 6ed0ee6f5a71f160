"""Operators that move elements: views, transpositions, slices, concatenations, reductions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.analysis.features import (
    BasisMap,
    Declaration,
    Dims,
    S,
    dimension,
    dimensions,
    move,
    operand_of,
    pass_on,
    rank_of,
    size_of,
)

aten = torch.ops.aten

SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})


def _transpose(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, rank = operand_of(node, 0), rank_of(node)
    first, second = (dimension(d, rank) for d in node.args[1:3])
    order = {first: second, second: first}
    return move(bases, node, x, lambda d: order.get(d, d))


def _permute(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, rank = operand_of(node, 0), rank_of(node)
    order = dimensions(node.args[1], rank)
    return move(bases, node, x, order.index)


def _unsqueeze(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x, rank = operand_of(node, 0), rank_of(node)
    at = dimension(node.args[1], rank)
    return move(bases, node, x, lambda d: d + (d >= at))


def _squeeze(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x = operand_of(node, 0)
    at = dimension(node.args[1], rank_of(x))
    if any(at in dims for dims in bases.features.get(x, {})):
        return []
    return move(bases, node, x, lambda d: d - (d > at))


def _view(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """Keeps an axis whose dimensions are split or joined without touching others."""
    x = operand_of(node, 0)
    kept = True
    for dims, axis in list(bases.features.get(x, {}).items()):
        found = _same_span(x, dims, node)
        if found is None:
            kept = False
        else:
            bases.give(node, found, axis)
            for width in (_inner_size(x, dims), _inner_size(node, found)):
                bases.axes.cut(axis, width)
    return [x] if kept else []


def _same_span(x: fx.Node, dims: Dims, node: fx.Node) -> Dims | None:
    """The dimensions of `node` that hold what adjacent `dims` hold in `x`."""
    if list(dims) != list(range(dims[0], dims[-1] + 1)):
        return None
    behind = 1
    for d in range(dims[-1] + 1, rank_of(x)):
        if not isinstance(x.meta["val"].shape[d], int):
            return None
        behind *= size_of(x, (d,))
    wanted, found, product = size_of(x, dims), list[int](), 1
    for d in reversed(range(rank_of(node))):
        size = node.meta["val"].shape[d]
        if not isinstance(size, int):
            return None
        if behind > 1 or (behind == 1 and size == 1 and not found and product == wanted):
            if behind % size:
                return None
            behind //= size
            continue
        found.insert(0, d)
        product *= size
        if product == wanted:
            return tuple(found)
        if product > wanted:
            return None
    return None


def _inner_size(node: fx.Node, dims: Dims) -> int:
    return size_of(node, dims[-1:]) if len(dims) > 1 else size_of(node, dims)


def _slice(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x = operand_of(node, 0)
    values: list[Any] = [*node.args, *(0, 0, None, 1)[len(node.args) - 1 :]]
    dim, start, step = dimension(values[1], rank_of(x)), values[2] or 0, values[4]
    for dims, axis in list(bases.features.get(x, {}).items()):
        if dim not in dims:
            bases.give(node, dims, axis)
        elif dims == (dim,) and step == 1 and isinstance(start, int):
            _take(bases, node, dims, axis, start % bases.axes.sizes[axis])
        else:
            return []
    return [x]


def _take(bases: BasisMap, node: fx.Node, dims: Dims, axis: int, start: int) -> None:
    part = bases.fresh(node, dims)
    bases.axes.link(axis, part, a_start=start, size=bases.axes.sizes[part])


def _getitem(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """A piece of a split; other operators with several results block their operands."""
    parts, index = node.args
    assert isinstance(parts, fx.Node)
    if parts.target not in SPLITS or not isinstance(index, int):
        return []
    x = operand_of(parts, 0)
    dim = _split_dim(parts)
    for dims, axis in list(bases.features.get(x, {}).items()):
        if dim not in dims:
            bases.give(node, dims, axis)
        elif dims == (dim,):
            sizes = [int(part.shape[dim]) for part in parts.meta["val"][:index]]
            _take(bases, node, dims, axis, sum(sizes))
        else:
            bases.axes.block(axis, node.name, "heads are split unevenly")
    return [parts]


def _split(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    del bases
    return [operand_of(node, 0)]


def _split_dim(node: fx.Node) -> int:
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return dimension(dim, rank_of(operand_of(node, 0)))


def _cat(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    operands: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = dimension(dim, rank_of(node))
    for dims in {dims for x in operands for dims in bases.features.get(x, {})}:
        if dims == (dim,):
            out, start = bases.fresh(node, dims), 0
            for x in operands:
                part = bases.of(x, dims)
                bases.axes.link(out, part, a_start=start, size=bases.axes.sizes[part])
                start += bases.axes.sizes[part]
        elif dim not in dims:
            axes = [bases.of(x, dims) for x in operands]
            for other in axes[1:]:
                bases.axes.link(axes[0], other)
            bases.give(node, dims, axes[0])
        else:
            return []
    return operands


def _reduce(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    """A mean or sum over dimensions that are no features."""
    x = operand_of(node, 0)
    dims: Any = node.args[1] if len(node.args) > 1 else None
    keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
    if dims is None:
        return []
    reduced = sorted(dimensions(dims, rank_of(x)))
    if any(d in reduced for feature in bases.features.get(x, {}) for d in feature):
        return []
    if node.target is aten.sum.dim_IntList:
        for axis in bases.features.get(x, {}).values():
            bases.axes.block(axis, node.name, "a sum adds shifts up", {S})
    return move(bases, node, x, lambda d: d if keep else d - sum(r < d for r in reduced))


def _index_select(bases: BasisMap, node: fx.Node) -> list[fx.Node]:
    x = operand_of(node, 0)
    dim = dimension(node.args[1], rank_of(x))
    if any(dim in dims for dims in bases.features.get(x, {})):
        return []
    return pass_on(bases, node)


DECLARATIONS: dict[Any, Declaration] = {
    aten.to.dtype: pass_on,
    aten.clone.default: pass_on,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten.flatten.using_ints: _view,
    aten.slice.Tensor: _slice,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.index_select.default: _index_select,
    **dict.fromkeys(SPLITS, _split),
}
