"""Transforms as values: matrices with structure, in the row-vector convention ``x -> x T``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Transform(ABC):
    """An invertible ``[n, n]`` matrix."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Its order n."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """``T`` as ``[n, n]`` float64."""

    @abstractmethod
    def inverse(self) -> Transform:
        """``T^-1``."""

    @abstractmethod
    def dual(self) -> Transform:
        """``T^-T``: what a consumer's weight sees when its input is transformed by ``T``."""

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """``x T`` along an axis.

        Args:
            x: Floating; the axis has length `size`.
            axis: The axis.

        Returns:
            The shape and dtype of `x`.
        """
        moved = x.movedim(axis, -1)
        return (moved @ self.matrix().to(x.dtype)).movedim(-1, axis)


@dataclass(frozen=True, eq=False)
class Diagonal(Transform):
    """``diag(scale)``, all scales positive.

    Attributes:
        scale: ``[n]`` float64.
    """

    scale: Tensor

    @property
    def size(self) -> int:
        """The order n."""
        return len(self.scale)

    def matrix(self) -> Tensor:
        """The scales on the diagonal."""
        return torch.diag(self.scale)

    def inverse(self) -> Diagonal:
        """The reciprocal scales."""
        return Diagonal(1 / self.scale)

    def dual(self) -> Diagonal:
        """The reciprocal scales."""
        return self.inverse()

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """Scales an axis."""
        return (x.movedim(axis, -1) * self.scale.to(x.dtype)).movedim(-1, axis)


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

    def matrix(self) -> Tensor:
        """Ones where a channel goes."""
        return torch.eye(self.size, dtype=torch.float64)[:, self.index]

    def inverse(self) -> Permutation:
        """The way back."""
        return Permutation(torch.argsort(self.index))

    def dual(self) -> Permutation:
        """Itself."""
        return self

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """Reorders an axis."""
        return x.index_select(axis, self.index)


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

    def matrix(self) -> Tensor:
        """The rotation."""
        return self.rotation

    def inverse(self) -> Orthogonal:
        """The transpose."""
        return Orthogonal(self.rotation.T)

    def dual(self) -> Orthogonal:
        """Itself."""
        return self
