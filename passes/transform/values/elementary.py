"""Transforms with numbers of their own: scales, shifts, permutations, matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.passes.transform.values.base import Encoded, Transform, TransformCost

_FLOAT_BITS = 32
"""Width of a parameter where a transform stays in the program."""


@dataclass(frozen=True)
class Identity(Transform):
    """No change.

    Attributes:
        n: The order.
    """

    n: int

    @property
    def size(self) -> int:
        """The order n."""
        return self.n

    @property
    def is_identity(self) -> bool:
        """Always."""
        return True

    def inverse(self) -> Identity:
        """Itself."""
        return self

    def dual(self) -> Identity:
        """Itself."""
        return self

    def encode(self) -> Encoded:
        """Without parameters."""
        return Encoded("identity")

    def cost(self) -> TransformCost:
        """Nothing."""
        return TransformCost(0, 0)


@dataclass(frozen=True, eq=False)
class Diagonal(Transform):
    """``diag(scale)``, no scale zero.

    Attributes:
        scale: ``[n]`` float64.
    """

    scale: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.scale)

    @property
    def is_identity(self) -> bool:
        """Whether all scales are 1."""
        return bool((self.scale == 1).all())

    def inverse(self) -> Diagonal:
        """The reciprocal scales."""
        return Diagonal(1 / self.scale)

    def dual(self) -> Diagonal:
        """The reciprocal scales."""
        return self.inverse()

    def encode(self) -> Encoded:
        """The scales."""
        return Encoded("diagonal", (self.scale,))

    def cost(self) -> TransformCost:
        """One product per channel."""
        return TransformCost(self.size, self.size * _FLOAT_BITS)


@dataclass(frozen=True, eq=False)
class Shift(Transform):
    """``x + b``: the one transform that is no matrix.

    Weights do not see it; biases do: a source's grows by ``b``, a sink's shrinks by ``W b``.

    Attributes:
        by: ``[n]`` float64.
    """

    by: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.by)

    @property
    def is_linear(self) -> bool:
        """It is not."""
        return False

    @property
    def is_identity(self) -> bool:
        """Whether the offset is zero."""
        return bool((self.by == 0).all())

    def linear_part(self) -> Identity:
        """Nothing."""
        return Identity(self.size)

    def inverse(self) -> Shift:
        """The shift back."""
        return Shift(-self.by)

    def dual(self) -> Identity:
        """What weights see: nothing."""
        return Identity(self.size)

    def encode(self) -> Encoded:
        """The offset."""
        return Encoded("shift", (self.by,))

    def cost(self) -> TransformCost:
        """One sum per channel."""
        return TransformCost(self.size, self.size * _FLOAT_BITS)


@dataclass(frozen=True, eq=False)
class Permutation(Transform):
    """Channel ``i`` of the result is channel ``index[i]``.

    Attributes:
        index: ``[n]`` int64, each of ``0 .. n-1`` once.
    """

    index: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.index)

    @property
    def is_identity(self) -> bool:
        """Whether every channel stays."""
        return bool((self.index == torch.arange(self.size)).all())

    def inverse(self) -> Permutation:
        """The way back."""
        return Permutation(torch.argsort(self.index))

    def dual(self) -> Permutation:
        """Itself."""
        return self

    def encode(self) -> Encoded:
        """The index."""
        return Encoded("permutation", (self.index,))

    def cost(self) -> TransformCost:
        """Moves only; an index takes as few bits as the order needs."""
        return TransformCost(0, self.size * max(1, (self.size - 1).bit_length()))


@dataclass(frozen=True, eq=False)
class Orthogonal(Transform):
    """An orthogonal matrix.

    Attributes:
        rotation: ``[n, n]`` float64 with ``Q Q^T = 1``.
    """

    rotation: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.rotation)

    def inverse(self) -> Orthogonal:
        """The transpose."""
        return Orthogonal(self.rotation.T)

    def dual(self) -> Orthogonal:
        """Itself."""
        return self

    def encode(self) -> Encoded:
        """The matrix."""
        return Encoded("matrix", (self.rotation,))

    def cost(self) -> TransformCost:
        """A product with a dense matrix."""
        return _dense_cost(self.rotation)


@dataclass(frozen=True, eq=False)
class Affine(Transform):
    """An invertible matrix, to be followed by a `Shift` where a method needs one.

    Attributes:
        linear: ``[n, n]`` float64.
    """

    linear: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.linear)

    def inverse(self) -> Affine:
        """The inverse matrix."""
        return Affine(torch.linalg.inv(self.linear))

    def dual(self) -> Affine:
        """The inverse, transposed."""
        return Affine(torch.linalg.inv(self.linear).T)

    def encode(self) -> Encoded:
        """The matrix."""
        return Encoded("matrix", (self.linear,))

    def cost(self) -> TransformCost:
        """A product with a dense matrix."""
        return _dense_cost(self.linear)


def _dense_cost(matrix: Tensor) -> TransformCost:
    return TransformCost(2 * len(matrix) ** 2, matrix.numel() * _FLOAT_BITS)
