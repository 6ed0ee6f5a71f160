"""Transforms made of transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch

from qcompile.passes.transform.values.base import Encoded, Transform, TransformCost


@dataclass(frozen=True, eq=False)
class Compose(Transform):
    """One after the other: ``T_1 T_2 ... T_k``.

    Attributes:
        parts: At least one, all of one order.
    """

    parts: tuple[Transform, ...]

    def __post_init__(self) -> None:
        if len({part.size for part in self.parts}) != 1:
            raise ValueError(f"transforms of orders {[p.size for p in self.parts]} do not compose")

    @property
    def size(self) -> int:
        """The order n."""
        return self.parts[0].size

    @property
    def is_linear(self) -> bool:
        """Whether all parts are."""
        return all(part.is_linear for part in self.parts)

    @property
    def is_identity(self) -> bool:
        """Whether all parts are."""
        return all(part.is_identity for part in self.parts)

    def linear_part(self) -> Compose:
        """The matrices of all parts."""
        return Compose(tuple(part.linear_part() for part in self.parts))

    def inverse(self) -> Compose:
        """The inverses, in the opposite order."""
        return Compose(tuple(part.inverse() for part in reversed(self.parts)))

    def dual(self) -> Compose:
        """The duals, in the same order."""
        return Compose(tuple(part.dual() for part in self.parts))

    def encode(self) -> Encoded:
        """Its parts behind their number."""
        return _joined("compose", (len(self.parts),), self.parts)

    def cost(self) -> TransformCost:
        """That of all parts."""
        return _total(self.parts)


@dataclass(frozen=True, eq=False)
class BlockDiagonal(Transform):
    """Side by side: each block of channels has its own transform.

    Attributes:
        blocks: At least one.
    """

    blocks: tuple[Transform, ...]

    @property
    def size(self) -> int:
        """The order n."""
        return sum(block.size for block in self.blocks)

    @property
    def is_linear(self) -> bool:
        """Whether all blocks are."""
        return all(block.is_linear for block in self.blocks)

    @property
    def is_identity(self) -> bool:
        """Whether all blocks are."""
        return all(block.is_identity for block in self.blocks)

    def linear_part(self) -> BlockDiagonal:
        """The matrices of all blocks."""
        return self._each(lambda block: block.linear_part())

    def inverse(self) -> BlockDiagonal:
        """The inverses."""
        return self._each(lambda block: block.inverse())

    def dual(self) -> BlockDiagonal:
        """The duals."""
        return self._each(lambda block: block.dual())

    def encode(self) -> Encoded:
        """Matrices of one order as one tensor, once if all are the same; else block by block."""
        encoded = [block.encode() for block in self.blocks]
        orders = {block.size for block in self.blocks}
        if len(orders) == 1 and all(e.kind == "matrix" and e.params[0].dim() == 2 for e in encoded):
            matrices = [e.params[0] for e in encoded]
            if all(matrix is matrices[0] for matrix in matrices):
                return Encoded("matrix", (matrices[0],))
            return Encoded("matrix", (torch.stack(matrices),))
        sizes = tuple(block.size for block in self.blocks)
        return _joined("block_diagonal", (len(sizes), *sizes), self.blocks)

    def cost(self) -> TransformCost:
        """That of all blocks; one that is used several times is stored once."""
        distinct = {id(block): block for block in self.blocks}
        bits = sum(block.cost().parameter_bits for block in distinct.values())
        return TransformCost(_total(self.blocks).flops, bits)

    def _each(self, function: Callable[[Transform], Transform]) -> BlockDiagonal:
        done: dict[int, Transform] = {}
        for block in self.blocks:
            if id(block) not in done:
                done[id(block)] = function(block)
        return BlockDiagonal(tuple(done[id(block)] for block in self.blocks))


def _joined(kind: str, dims: tuple[int, ...], parts: tuple[Transform, ...]) -> Encoded:
    encoded = [part.encode() for part in parts]
    return Encoded(
        "+".join([kind, *(e.kind for e in encoded)]),
        tuple(p for e in encoded for p in e.params),
        (*dims, *(d for e in encoded for d in e.dims)),
    )


def _total(parts: tuple[Transform, ...]) -> TransformCost:
    return reduce(lambda a, b: a + b, (part.cost() for part in parts))
