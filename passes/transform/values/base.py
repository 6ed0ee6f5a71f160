"""What every transform can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.kernels.transform.reference import transform


@dataclass(frozen=True)
class TransformCost:
    """What a transform takes where it is left in the program.

    Attributes:
        flops: Multiplications and additions for one row ``[n]``.
        parameter_bits: Of the numbers that are stored for it.
    """

    flops: int
    parameter_bits: int

    def __add__(self, other: TransformCost) -> TransformCost:
        return TransformCost(self.flops + other.flops, self.parameter_bits + other.parameter_bits)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A transform as `qc.transform` takes it, and as it is stored.

    Attributes:
        kind: Names of `qcompile.kernels.transform.reference.KINDS` in prefix order.
        params: Its numbers.
        dims: Its sizes.
    """

    kind: str
    params: tuple[Tensor, ...] = ()
    dims: tuple[int, ...] = ()


class Transform(ABC):
    """An invertible map of rows ``[n]``: a matrix, but for `Shift`."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Its order n."""

    @abstractmethod
    def inverse(self) -> Transform:
        """``T^-1``."""

    @abstractmethod
    def dual(self) -> Transform:
        """``T^-T``: what a consumer's weight sees when its input is transformed by ``T``."""

    @abstractmethod
    def encode(self) -> Encoded:
        """Itself as arguments of `qc.transform`."""

    @abstractmethod
    def cost(self) -> TransformCost:
        """What it takes at run time."""

    @property
    def is_linear(self) -> bool:
        """Whether it is a matrix: it maps zero to zero."""
        return True

    @property
    def is_identity(self) -> bool:
        """Whether it is known to change nothing."""
        return False

    def linear_part(self) -> Transform:
        """The matrix, without what a `Shift` adds."""
        return self

    def offset(self) -> Tensor:
        """What zero becomes: ``[n]`` float64; zero unless a `Shift` is in it."""
        return self.apply(torch.zeros(self.size, dtype=torch.float64))

    def transposed(self) -> Transform:
        """``T^T``: what a weight's input axis sees when the transform goes into the weight."""
        return self.inverse().dual()

    def matrix(self) -> Tensor:
        """``T`` as ``[n, n]`` float64; of a `Shift`, the identity plus the shift."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def apply(self, x: Tensor, axis: int = -1) -> Tensor:
        """``x T`` along an axis.

        Args:
            x: Floating; the axis has length `size`.
            axis: The axis.

        Returns:
            The shape and dtype of `x`.
        """
        encoded = self.encode()
        moved = x.movedim(axis, -1)
        done = transform(moved, list(encoded.params), encoded.kind, list(encoded.dims))
        return done.movedim(-1, axis)
