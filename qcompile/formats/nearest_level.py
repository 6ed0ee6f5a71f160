"""The nearest of some levels, for many values at a time."""

from __future__ import annotations

from functools import lru_cache
from math import isfinite

import torch
from torch import Tensor

from qcompile.kernels.lookup.levels import levels

_KEY_BITS = 16
"""The upper half of a float32 is its sign, its exponent and 7 bits of its mantissa."""


class NearestLevel:
    """Finds levels by the upper halves of values, which is ten times as fast as a binary search.

    All values with the same upper half lie so close together that few boundaries between levels
    stand among them, mostly none: a table tells how many stand before, and comparisons with the
    next ones tell the rest. A value halfway between two levels gets the lower one.

    Args:
        table: Name or numbers of the levels; those that are not finite are left out.
    """

    def __init__(self, table: str) -> None:
        first: dict[float, int] = {}  # a level that has two codes, such as 0 and -0, keeps one
        for code, value in enumerate(levels(table)):
            if isfinite(value):
                first.setdefault(value, code)
        ordered = sorted(first)
        exact = torch.tensor(ordered, dtype=torch.float64)
        self.values = exact.to(torch.float32)
        """The levels in ascending order, float32."""
        self._codes = torch.tensor([first[value] for value in ordered], dtype=torch.uint8)
        boundaries = ((exact[1:] + exact[:-1]) / 2).to(torch.float32)
        self._next_boundary = torch.cat((boundaries, torch.tensor([torch.inf])))
        least, most = _bins()
        self._boundaries_before = torch.bucketize(least, boundaries, out_int32=True)
        within = torch.bucketize(most, boundaries, out_int32=True) - self._boundaries_before
        self._most_within = int(within.max())

    def index(self, values: Tensor) -> Tensor:
        """Where the nearest levels stand in `values`' order, int32.

        Args:
            values: Float32, no NaN.
        """
        flat = values.contiguous().flatten()
        keys = (flat.view(torch.int32) >> _KEY_BITS).bitwise_and_((1 << _KEY_BITS) - 1)
        index = self._boundaries_before.index_select(0, keys)
        for _ in range(self._most_within):
            index += flat > self._next_boundary.index_select(0, index)
        return index.reshape(values.shape)

    def codes(self, values: Tensor) -> Tensor:
        """Codes of the nearest levels, uint8."""
        return take(self._codes, self.index(values))

    def round(self, values: Tensor) -> Tensor:
        """The nearest levels themselves, float32."""
        return take(self.values, self.index(values))


@lru_cache(maxsize=64)
def nearest_level(table: str) -> NearestLevel:
    """The one `NearestLevel` of a table."""
    return NearestLevel(table)


def take(table: Tensor, index: Tensor) -> Tensor:
    """table[index], by the fastest way that torch has: a table [L], int32 indices of any shape."""
    return table.index_select(0, index.flatten()).reshape(index.shape)


def _bins() -> tuple[Tensor, Tensor]:
    """The least and the largest value with each upper half, where NaN counts as infinite."""
    low = torch.arange(1 << _KEY_BITS, dtype=torch.int64) << _KEY_BITS
    ends = torch.stack((low, low | ((1 << _KEY_BITS) - 1)))
    signed = torch.where(ends >= 1 << 31, ends - (1 << 32), ends).to(torch.int32)
    values = signed.view(torch.float32)
    infinite = torch.where(signed < 0, -torch.inf, torch.inf)
    values = torch.where(values.isnan(), infinite, values)
    return values.amin(dim=0), values.amax(dim=0)
