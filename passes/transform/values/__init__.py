"""Transforms as values: matrices with structure, in the row-vector convention ``x -> x T``."""

from __future__ import annotations

from qcompile.passes.transform.values.base import Encoded, Transform, TransformCost
from qcompile.passes.transform.values.composite import BlockDiagonal, Compose
from qcompile.passes.transform.values.elementary import (
    Affine,
    Diagonal,
    Identity,
    Orthogonal,
    Permutation,
    Shift,
)
from qcompile.passes.transform.values.encoding import decode
from qcompile.passes.transform.values.hadamard import (
    Hadamard,
    Rotation,
    random_hadamard,
    random_orthogonal,
)
from qcompile.passes.transform.values.simplify import simplify

__all__ = [
    "Affine",
    "BlockDiagonal",
    "Compose",
    "Diagonal",
    "Encoded",
    "Hadamard",
    "Identity",
    "Orthogonal",
    "Permutation",
    "Rotation",
    "Shift",
    "Transform",
    "TransformCost",
    "decode",
    "random_hadamard",
    "random_orthogonal",
    "simplify",
]
