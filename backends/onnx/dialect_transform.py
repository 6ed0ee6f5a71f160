"""Transforms of the last axis in standard operators."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError
from qcompile.kernels.hadamard.matrix import core, core_order

TRANSFORM = Table()

_LARGEST_FACTOR = 64
"""Sylvester's matrices are Kronecker products: a few small ones in turn cost less than one."""


@TRANSFORM.register(torch.ops.qc.transform.default)
def _transform(
    b: Builder, x: ir.Value, params: Sequence[ir.Value], kind: str, dims: Sequence[int]
) -> ir.Value:
    return _Transform(b, iter(kind.split("+")), iter(params), iter(dims)).apply(
        x, int(b.shape(x)[-1])
    )


class _Transform:
    """Reads the parts of a transform in the order that `qc::transform` documents."""

    def __init__(
        self, b: Builder, kinds: Iterator[str], params: Iterator[ir.Value], dims: Iterator[int]
    ) -> None:
        self._b = b
        self._kinds = kinds
        self._params = params
        self._dims = dims

    def apply(self, x: ir.Value, size: int) -> ir.Value:
        """The next transform, on a last axis of `size` channels."""
        b = self._b
        match next(self._kinds):
            case "identity":
                return x
            case "diagonal":
                return b.op("Mul", x, self._numbers())
            case "shift":
                return b.op("Add", x, self._numbers())
            case "permutation":
                return b.op("Gather", x, next(self._params), axis=-1)
            case "hadamard":
                return self._hadamard(x, size)
            case "matrix":
                return self._matrix(x, size)
            case "compose":
                for _ in range(next(self._dims)):
                    x = self.apply(x, size)
                return x
            case "block_diagonal":
                return self._block_diagonal(x)
            case kind:
                raise UnsupportedError(f"the transform '{kind}'")

    def _numbers(self) -> ir.Value:
        return self._b.cast(next(self._params), self._b.dtype)

    def _hadamard(self, x: ir.Value, size: int) -> ir.Value:
        b = self._b
        block, transposed, signed = (next(self._dims) for _ in range(3))
        signs = self._numbers() if signed else None
        if signs is not None and not transposed:
            x = b.op("Mul", x, signs)
        if size % block or core_order(block) is None:
            raise UnsupportedError(f"a Hadamard transform in blocks of {block} on {size} channels")
        x = self._joined(_multiply_blocks(b, x, block, bool(transposed)), size)
        return b.op("Mul", x, signs) if signs is not None and transposed else x

    def _matrix(self, x: ir.Value, size: int) -> ir.Value:
        b = self._b
        matrix = next(self._params)
        shape = b.shape(matrix)
        order = int(shape[-1])
        matrix = b.cast(matrix, b.dtype)
        if len(shape) == 2 and order == size:
            return b.op("MatMul", x, matrix)
        rows = b.op("Reshape", x, [-1, size // order, 1, order])
        return self._joined(b.op("MatMul", rows, matrix), size)

    def _block_diagonal(self, x: ir.Value) -> ir.Value:
        sizes = [next(self._dims) for _ in range(next(self._dims))]
        parts = self._b.ops("Split", x, sizes, outputs=len(sizes), axis=-1)
        made = [self.apply(part, size) for part, size in zip(parts, sizes, strict=True)]
        return self._b.op("Concat", *made, axis=-1)

    def _joined(self, parts: ir.Value, size: int) -> ir.Value:
        """Blocks in the shape of the result, but for a last axis of `size`."""
        leading = self._b.sizes(self._b.result.shape[:-1])
        return self._b.op("Reshape", parts, [*leading, size])


def _multiply_blocks(b: Builder, x: ir.Value, block: int, transposed: bool) -> ir.Value:
    """Every run of `block` channels times a normalized Hadamard matrix; the shape is another."""
    rest = block
    for factor in _factors(block, transposed):
        rest //= factor.shape[0]
        # The axes of a block in turn: each is the one in the middle while it is summed over.
        x = b.op("Reshape", x, [-1, factor.shape[0], rest])
        x = b.op("MatMul", b.constant(factor.numpy(), b.dtype), x)
    return b.op("Mul", x, 1 / math.sqrt(block))


def _factors(block: int, transposed: bool) -> Iterator[Tensor]:
    """Matrices to multiply the axes of a block with from the left, the first axis first."""
    order = core_order(block)
    assert order is not None
    if order > 1:
        matrix = core(order).double()
        yield matrix if transposed else matrix.T
    left = block // order
    while left > 1:
        size = min(left, _LARGEST_FACTOR)
        yield _sylvester(size)
        left //= size


def _sylvester(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
