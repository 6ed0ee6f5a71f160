"""From the arguments of `qc.transform` back to a value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qcompile.passes.transform.values.base import Transform
from qcompile.passes.transform.values.composite import BlockDiagonal, Compose
from qcompile.passes.transform.values.elementary import (
    Affine,
    Diagonal,
    Identity,
    Orthogonal,
    Permutation,
    Shift,
)
from qcompile.passes.transform.values.hadamard import Hadamard

_ORTHOGONAL_TOLERANCE = 1e-12
"""Of ``Q Q^T - 1``, by which a matrix is known to be a rotation, inverted by transposing."""


def decode(kind: str, params: Sequence[Tensor], dims: Sequence[int], size: int) -> Transform:
    """The value that `Transform.encode` encoded.

    Args:
        kind: As `qc.transform` takes it.
        params: The same.
        dims: The same.
        size: The order.

    Raises:
        ValueError: The kind is unknown.
    """
    return _decode(iter(kind.split("+")), iter(params), iter(dims), size)


def _decode(
    kinds: Iterator[str], params: Iterator[Tensor], dims: Iterator[int], size: int
) -> Transform:
    match next(kinds, ""):
        case "identity":
            return Identity(size)
        case "diagonal":
            return Diagonal(next(params).to(torch.float64))
        case "shift":
            return Shift(next(params).to(torch.float64))
        case "permutation":
            return Permutation(next(params))
        case "hadamard":
            block, flipped, signed = next(dims), next(dims), next(dims)
            return Hadamard(size, block, next(params) if signed else None, bool(flipped))
        case "matrix":
            return _matrices(next(params).to(torch.float64), size)
        case "compose":
            count = next(dims)
            return Compose(tuple(_decode(kinds, params, dims, size) for _ in range(count)))
        case "block_diagonal":
            sizes = [next(dims) for _ in range(next(dims))]
            return BlockDiagonal(tuple(_decode(kinds, params, dims, n) for n in sizes))
        case kind:
            raise ValueError(f"unknown transform '{kind}'")


def _matrices(matrix: Tensor, size: int) -> Transform:
    if matrix.dim() == 3:
        return BlockDiagonal(tuple(_matrix(block) for block in matrix))
    one = _matrix(matrix)
    return one if one.size == size else BlockDiagonal((one,) * (size // one.size))


def _matrix(matrix: Tensor) -> Transform:
    error = matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)
    is_rotation = float(error.abs().max()) <= _ORTHOGONAL_TOLERANCE
    return Orthogonal(matrix) if is_rotation else Affine(matrix)
