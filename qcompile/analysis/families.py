"""Families of equivalent transforms, and the places where a transform can be absorbed.

Row-vector convention throughout: a transform ``T`` on a value ``x`` makes it ``x T``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Family(Enum):
    """What kind of matrix a transform is, which decides what commutes with it."""

    PERMUTATION = "permutation"
    DIAGONAL = "diagonal"
    """Positive scales."""
    ORTHOGONAL = "orthogonal"
    SHIFT = "shift"
    """A vector that is added: no matrix, it goes into biases."""


class PortRole(Enum):
    """What a weight's axis does to the value whose basis it lies on."""

    SOURCE = "source"
    """It produces the value."""
    SINK = "sink"
    """It consumes the value."""
    GAIN = "gain"
    """It scales the value elementwise."""
    CACHE = "cache"
    """It is no weight but the cache, by the name of its input, which holds values on this basis."""


@dataclass(frozen=True)
class Port:
    """A stretch of a weight's axis that absorbs a transform.

    Attributes:
        weight: Name of the weight.
        axis: Of the weight.
        start: First index of the stretch.
        size: Its length.
        role: What it does.
        dual: Whether the axis becomes ``v T^-T`` when the basis is transformed (a sink, a query
            opposite its key), and not ``v T`` (a source).
    """

    weight: str
    axis: int
    start: int
    size: int
    role: PortRole
    dual: bool = False

    def __lt__(self, other: Port) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[str, int, int, int, str, bool]:
        return (self.weight, self.axis, self.start, self.size, self.role.value, self.dual)


@dataclass(frozen=True)
class Blocker:
    """Why a family is not legal on a basis.

    Attributes:
        family: The family.
        node: The node that does not commute with it.
        reason: One clause.
    """

    family: Family
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.family.value}: {self.reason} ('{self.node}')"
