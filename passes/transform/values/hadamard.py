"""Hadamard transforms, and the choice of one for a given number of channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.kernels.hadamard.matrix import core_order, has_order, largest_block
from qcompile.kernels.transform.flops import hadamard_flops
from qcompile.passes.transform.values.base import Encoded, Transform, TransformCost
from qcompile.passes.transform.values.elementary import Orthogonal

_SIGN_BITS = 8
"""Signs are stored as int8."""


@dataclass(frozen=True, eq=False)
class Hadamard(Transform):
    """``diag(signs) (I kron H / sqrt(block))``: one Hadamard matrix per block of channels.

    Attributes:
        n: The order.
        block: Order of each Hadamard matrix; divides n.
        signs: ``[n]`` int8 of +1 and -1, or None for ones.
        flipped: Whether it is the transpose of the above, which is the inverse.
    """

    n: int
    block: int
    signs: Tensor | None = None
    flipped: bool = False

    def __post_init__(self) -> None:
        if self.n % self.block or not has_order(self.block):
            raise ValueError(f"no Hadamard transform in blocks of {self.block} on {self.n}")

    @property
    def size(self) -> int:
        """The order n."""
        return self.n

    @property
    def is_identity(self) -> bool:
        """Whether blocks are of one channel, without signs."""
        return self.block == 1 and self.signs is None

    @property
    def is_symmetric(self) -> bool:
        """Whether it is its own inverse: Sylvester's matrix without signs."""
        return self.signs is None and core_order(self.block) == 1

    def inverse(self) -> Hadamard:
        """The transpose."""
        return self if self.is_symmetric else replace(self, flipped=not self.flipped)

    def dual(self) -> Hadamard:
        """Itself."""
        return self

    def encode(self) -> Encoded:
        """Its signs, if any; block, whether transposed, whether signed."""
        dims = (self.block, int(self.flipped), int(self.signs is not None))
        return Encoded("hadamard", () if self.signs is None else (self.signs,), dims)

    def cost(self) -> TransformCost:
        """``log2`` additions per channel, and a product with the core."""
        signed = self.signs is not None
        flops = hadamard_flops(self.n, self.block, signed)
        return TransformCost(flops, signed * self.n * _SIGN_BITS)


@dataclass(frozen=True)
class Rotation:
    """A rotation that was chosen for a number of channels.

    Attributes:
        value: The transform.
        choice: What it is, for reports: one clause.
    """

    value: Transform
    choice: str


def random_hadamard(n: int, generator: torch.Generator | None, *, online: bool) -> Rotation:
    """The rotation of n channels that is nearest to a randomized Hadamard transform.

    Where no Hadamard matrix of order n is known, a rotation that goes into weights is the Kronecker
    product of a random orthogonal matrix and the largest Hadamard matrix whose order divides n, so
    that it mixes all channels; one that stays in the program is that Hadamard matrix per block, for
    a dense factor would cost too much.

    Args:
        n: The order.
        generator: For signs and random factors; None: no signs, which an online transform need not
            have.
        online: Whether it will stay in the program.
    """
    block = largest_block(n)
    signs = None if generator is None else _signs(n, generator)
    if block == n or online or generator is None:
        kind = "a Hadamard matrix" if block == n else f"Hadamard matrices on blocks of {block}"
        return Rotation(Hadamard(n, block, signs), f"{kind} for {n} channels")
    factor = random_orthogonal(n // block, generator).rotation
    inner = Hadamard(block, block).matrix()
    assert signs is not None
    dense = torch.kron(factor.contiguous(), inner.contiguous()) * signs.to(torch.float64)[:, None]
    return Rotation(
        Orthogonal(dense),
        f"a random orthogonal factor of order {n // block} times a Hadamard matrix of order "
        f"{block} for {n} channels",
    )


def random_orthogonal(n: int, generator: torch.Generator) -> Orthogonal:
    """An orthogonal matrix, uniform over all of them (Stewart 1980)."""
    normal = torch.randn(n, n, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return Orthogonal(q * torch.sign(torch.diagonal(r)))


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.int8)
