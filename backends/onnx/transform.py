"""`qc.transform` in standard operators, and with another spelling of Hadamard transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.values import UnsupportedError, static_size
from qcompile.kernels.hadamard.matrix import core, core_order, sylvester

HadamardEmission = Callable[[Builder, ir.Value, "Place", int, bool], ir.Value]
"""Writes a Hadamard transform of blocks of a size, transposed or not."""

_LARGEST_FACTOR = 64
"""Sylvester's matrix is multiplied as a Kronecker product of factors up to this order."""


@dataclass(frozen=True)
class Place:
    """Where a transform works.

    Attributes:
        rank: Of the value.
        size: Channels on its last axis.
    """

    rank: int
    size: int

    def split(self, b: Builder, x: ir.Value, *sizes: int) -> ir.Value:
        """The last axis in parts; the others stay, whatever their sizes."""
        return b.op("Reshape", x, [*([0] * (self.rank - 1)), *sizes])


def emit_transform(
    b: Builder,
    x: ir.Value,
    params: Sequence[ir.Value],
    kind: str,
    dims: Sequence[int],
    hadamard: HadamardEmission,
) -> ir.Value:
    """Writes a `qc.transform`.

    Args:
        b: The builder, at the call.
        x: What is transformed.
        params: As the call has them.
        kind: The same.
        dims: The same.
        hadamard: How Hadamard transforms are written.

    Raises:
        UnsupportedError: A kind or an order of a Hadamard matrix is unknown.
    """
    # Channels do not vary in number, even where the trace of a plain module left that open.
    size = int(b.shape(x)[-1])
    rest = _Rest(iter(kind.split("+")), iter(params), iter(int(d) for d in dims), hadamard)
    return _emit(b, x, Place(b.rank(x), size), rest)


def standard_hadamard(
    b: Builder, x: ir.Value, place: Place, block: int, transposed: bool
) -> ir.Value:
    """One small matrix product per Kronecker factor."""
    order = core_order(block)
    assert order is not None
    factors = _sylvester_factors(block // order)
    matrices = [sylvester(factor) for factor in factors]
    if order > 1:
        matrices.insert(0, core(order).T if transposed else core(order))
    after = 1
    for matrix in reversed(matrices):
        width = len(matrix)
        scaled = matrix.to(torch.float64) / math.sqrt(width)
        if after == 1:
            parts = place.split(b, x, place.size // width, width)
            x = b.op("MatMul", parts, b.constant(scaled.numpy(), b.dtype))
        else:
            parts = place.split(b, x, place.size // (width * after), width, after)
            x = b.op("MatMul", b.constant(scaled.T.numpy(), b.dtype), parts)
        after *= width
    return place.split(b, x, place.size) if matrices else x


@dataclass(frozen=True)
class _Rest:
    """What has not been written yet."""

    kinds: Iterator[str]
    params: Iterator[ir.Value]
    dims: Iterator[int]
    hadamard: HadamardEmission


def _emit(b: Builder, x: ir.Value, place: Place, rest: _Rest) -> ir.Value:
    match next(rest.kinds, None):
        case "identity":
            return x
        case "diagonal":
            return b.op("Mul", x, b.cast(next(rest.params), b.dtype))
        case "shift":
            return b.op("Add", x, b.cast(next(rest.params), b.dtype))
        case "permutation":
            return b.op("Gather", x, next(rest.params), axis=-1)
        case "hadamard":
            return _hadamard(b, x, place, rest)
        case "matrix":
            return _matrix(b, x, place, next(rest.params))
        case "compose":
            for _ in range(next(rest.dims)):
                x = _emit(b, x, place, rest)
            return x
        case "block_diagonal":
            return _block_diagonal(b, x, place, rest)
        case kind:
            raise UnsupportedError(f"the transform '{kind}'")


def _hadamard(b: Builder, x: ir.Value, place: Place, rest: _Rest) -> ir.Value:
    block, transposed, signed = next(rest.dims), bool(next(rest.dims)), next(rest.dims)
    signs = b.cast(next(rest.params), b.dtype) if signed else None
    if place.size % block or core_order(block) is None:
        raise UnsupportedError(
            f"a Hadamard transform in blocks of {block} on {place.size} channels"
        )
    if signs is not None and not transposed:
        x = b.op("Mul", x, signs)
    x = rest.hadamard(b, x, place, block, transposed)
    return x if signs is None or not transposed else b.op("Mul", x, signs)


def _matrix(b: Builder, x: ir.Value, place: Place, matrix: ir.Value) -> ir.Value:
    order = static_size(b.shape(matrix)[-1])
    assert order is not None
    is_dense = order == place.size and b.rank(matrix) == 2
    matrix = b.cast(matrix, b.dtype)
    if is_dense:
        return b.op("MatMul", x, matrix)
    parts = place.split(b, x, place.size // order, 1, order)
    return place.split(b, b.op("MatMul", parts, matrix), place.size)


def _block_diagonal(b: Builder, x: ir.Value, place: Place, rest: _Rest) -> ir.Value:
    sizes = [next(rest.dims) for _ in range(next(rest.dims))]
    parts = b.ops("Split", x, sizes, outputs=len(sizes), axis=-1)
    done = [
        _emit(b, part, Place(place.rank, size), rest)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return b.op("Concat", *done, axis=-1)


def _sylvester_factors(power: int) -> list[int]:
    factors = []
    while power > 1:
        factors.append(min(power, _LARGEST_FACTOR))
        power //= factors[-1]
    return factors
