"""Compositions as short as they can be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch

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

_IDENTITY_TOLERANCE = 1e-13
"""Of a product of matrices minus the identity, in float64, times the order."""


def simplify(transform: Transform) -> Transform:
    """The same transform with as few parts as possible.

    Adjacent inverses cancel; diagonals, shifts, permutations and matrices merge with their like;
    blocks of one kind become one value. The result is an `Identity`, a single value, or a `Compose`
    of values that do not merge.
    """
    kept: list[Transform] = []
    for part in _flatten(transform):
        while kept and (merged := _merge(kept[-1], part)) is not None:
            kept.pop()
            part = merged
        if not _is_identity(part):
            kept.append(part)
    if not kept:
        return Identity(transform.size)
    return kept[0] if len(kept) == 1 else Compose(tuple(kept))


def _flatten(transform: Transform) -> Iterator[Transform]:
    match transform:
        case Compose(parts=parts):
            for part in parts:
                yield from _flatten(part)
        case BlockDiagonal(blocks=blocks):
            yield _joined(tuple(simplify(block) for block in blocks))
        case _:
            yield transform


def _joined(blocks: tuple[Transform, ...]) -> Transform:
    """Blocks of one kind as one value of that kind, where it has one."""
    if len(blocks) == 1:
        return blocks[0]
    plain = tuple(_like_neighbours(block, blocks) for block in blocks)
    if all(isinstance(block, Diagonal) for block in plain):
        return Diagonal(torch.cat([b.scale for b in plain if isinstance(b, Diagonal)]))
    if all(isinstance(block, Shift) for block in plain):
        return Shift(torch.cat([b.by for b in plain if isinstance(b, Shift)]))
    if all(isinstance(block, Permutation) for block in plain):
        starts = [0, *accumulate(block.size for block in plain)]
        pairs = zip(plain, starts, strict=False)
        return Permutation(
            torch.cat([b.index + start for b, start in pairs if isinstance(b, Permutation)])
        )
    return _one_hadamard(blocks) or BlockDiagonal(blocks)


def _like_neighbours(block: Transform, blocks: tuple[Transform, ...]) -> Transform:
    """An identity in the guise of the other blocks."""
    if not isinstance(block, Identity):
        return block
    kinds = {type(other) for other in blocks if not isinstance(other, Identity)}
    if kinds == {Diagonal}:
        return Diagonal(torch.ones(block.size, dtype=torch.float64))
    if kinds == {Shift}:
        return Shift(torch.zeros(block.size, dtype=torch.float64))
    return Permutation(torch.arange(block.size)) if kinds == {Permutation} else block


def _one_hadamard(blocks: tuple[Transform, ...]) -> Hadamard | None:
    """Hadamard transforms of one block size side by side, with signs on all of them or on none."""
    values = [block for block in blocks if isinstance(block, Hadamard)]
    kinds = {(value.block, value.flipped, value.signs is None) for value in values}
    if len(values) < len(blocks) or len(kinds) > 1:
        return None
    ((block, flipped, unsigned),) = kinds
    signs = None if unsigned else torch.cat([v.signs for v in values if v.signs is not None])
    return Hadamard(sum(value.n for value in values), block, signs, flipped)


def _merge(first: Transform, second: Transform) -> Transform | None:
    """One value for two adjacent ones, or None."""
    match first, second:
        case Diagonal(scale=a), Diagonal(scale=b):
            return Diagonal(a * b)
        case Shift(by=a), Shift(by=b):
            return Shift(a + b)
        case Permutation(index=a), Permutation(index=b):
            return Permutation(a[b])
        case Orthogonal(rotation=a), Orthogonal(rotation=b):
            return Orthogonal(a @ b)
        case ((Orthogonal() | Affine()), (Orthogonal() | Affine())):
            return Affine(first.matrix() @ second.matrix())
        case Hadamard(), Hadamard() if _are_inverse(first, second):
            return Identity(first.size)
        case BlockDiagonal(blocks=a), BlockDiagonal(blocks=b) if _sizes(a) == _sizes(b):
            pairs = zip(a, b, strict=True)
            return _joined(tuple(simplify(Compose((x, y))) for x, y in pairs))
    return None


def _sizes(blocks: tuple[Transform, ...]) -> list[int]:
    return [block.size for block in blocks]


def _are_inverse(first: Hadamard, second: Hadamard) -> bool:
    a = first.inverse()
    if (a.n, a.block, a.flipped) != (second.n, second.block, second.flipped):
        return False
    if a.signs is None or second.signs is None:
        return a.signs is second.signs
    return bool(torch.equal(a.signs, second.signs))


def _is_identity(transform: Transform) -> bool:
    if isinstance(transform, (Orthogonal, Affine)):
        error = transform.matrix() - torch.eye(transform.size, dtype=torch.float64)
        return float(error.abs().max()) <= _IDENTITY_TOLERANCE * transform.size
    return transform.is_identity
