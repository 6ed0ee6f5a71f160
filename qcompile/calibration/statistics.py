"""What calibration remembers of a value: sums that add up over micro-batches.

Each statistic sees the *rows* of a value, one per token, of all *channels*, by default the last
axis. `update` adds rows, `merge` adds what another one saw; the engine fixes the order of merging,
so that results do not depend on the number of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

_GRAM_BLOCK = 384
"""Columns of one block of a Gram matrix; a multiple of the width of matrix kernels."""


class Statistic(ABC):
    """Something remembered of the rows of a value.

    Subclasses are dataclasses of tensors and numbers, empty when made without arguments.
    """

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, channels]."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Adds all that `other` saw, which came after all that this one saw."""

    def tensors(self) -> dict[str, Tensor]:
        """The fields as tensors, for the journal."""
        return {f.name: torch.as_tensor(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`."""
        return cls(**{name: t.item() if t.ndim == 0 else t for name, t in tensors.items()})

    def finite(self) -> bool:
        """Whether all rows were finite."""
        return all(bool(t.isfinite().all()) for t in self.tensors().values())


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass(eq=False)
class Hessian(Statistic):
    """The second-moment matrix of the channels: that of the layer-wise error, up to a factor.

    A linear's output error for a weight error D is ``trace(D H D^T)`` per token, ``H = X^T X / n``.

    Attributes:
        sum: X^T X, float64 [K, K]; products in float32 over a micro-batch.
        count: Rows seen.
        peak: Largest magnitude of each channel, float32 [K].
    """

    sum: Tensor = field(default_factory=_empty)
    count: int = 0
    peak: Tensor = field(default_factory=_empty)

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        if len(rows):
            self._add(gram(rows), len(rows), rows.abs().amax(0))

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self._add(other.sum, other.count, other.peak)

    @property
    def matrix(self) -> Tensor:
        """X^T X / n, float64 [K, K], symmetric."""
        return self.sum / max(1, self.count)

    def _add(self, part: Tensor, count: int, peak: Tensor) -> None:
        if count:
            # A copy: what another one summed up must not change with this one.
            first = self.count == 0
            self.sum = part.to(torch.float64, copy=True) if first else self.sum.add_(part)
            self.peak = peak if first else torch.maximum(self.peak, peak)
            self.count += count


@dataclass(eq=False)
class ChannelRange(Statistic):
    """The extremes of each channel.

    Attributes:
        low: Minimum, float32 [K].
        high: Maximum, float32 [K].
        count: Rows seen.
    """

    low: Tensor = field(default_factory=_empty)
    high: Tensor = field(default_factory=_empty)
    count: int = 0

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        if len(rows):
            self._add(rows.amin(0), rows.amax(0), len(rows))

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        if other.count:
            self._add(other.low, other.high, other.count)

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude, float32 [K]."""
        return torch.maximum(self.high.abs(), self.low.abs())

    def _add(self, low: Tensor, high: Tensor, count: int) -> None:
        self.low = torch.minimum(self.low, low) if self.count else low
        self.high = torch.maximum(self.high, high) if self.count else high
        self.count += count


@dataclass(eq=False)
class ChannelMoments(Statistic):
    """Means of each channel.

    Attributes:
        sum: Of the values, float64 [K].
        sum_abs: Of the magnitudes, float64 [K].
        sum_squares: Of the squares, float64 [K].
        count: Rows seen.
    """

    sum: Tensor = field(default_factory=_empty)
    sum_abs: Tensor = field(default_factory=_empty)
    sum_squares: Tensor = field(default_factory=_empty)
    count: int = 0

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        wide = torch.float64
        squares = rows.square().sum(0, dtype=wide)
        self._add(rows.sum(0, dtype=wide), rows.abs().sum(0, dtype=wide), squares, len(rows))

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self._add(other.sum, other.sum_abs, other.sum_squares, other.count)

    @property
    def mean(self) -> Tensor:
        """float64 [K]."""
        return self.sum / max(1, self.count)

    @property
    def mean_abs(self) -> Tensor:
        """Mean magnitude, float64 [K]."""
        return self.sum_abs / max(1, self.count)

    @property
    def second_moment(self) -> Tensor:
        """Mean square, float64 [K]: the diagonal of the `Hessian`."""
        return self.sum_squares / max(1, self.count)

    def _add(self, values: Tensor, magnitudes: Tensor, squares: Tensor, count: int) -> None:
        if not count:
            return
        if self.count:
            values = self.sum + values
            magnitudes, squares = self.sum_abs + magnitudes, self.sum_squares + squares
        self.sum, self.sum_abs, self.sum_squares = values, magnitudes, squares
        self.count += count


@dataclass(eq=False)
class RowAbsmax(Statistic):
    """The largest magnitude of each row, in order: what scales per token will see.

    Attributes:
        values: float32 [rows].
    """

    values: Tensor = field(default_factory=_empty)

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        self.values = torch.cat((self.values, rows.abs().amax(1)))

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self.values = torch.cat((self.values, other.values))


@dataclass(eq=False)
class Histogram(Statistic):
    """How often magnitudes occur in the whole tensor: for percentiles and clipping searches.

    Bins are powers of two cut into 64, from 2^-32 to 2^32, the same for every tensor: histograms
    add up, and a percentile is known to 1.1 %. Smaller magnitudes count as zeros.

    Attributes:
        positive: Values > 0 per bin, int64 [4096].
        negative: Values < 0 per bin, int64 [4096].
        zeros: Values that are (nearly) 0.
        low: Least value.
        high: Largest value.
    """

    positive: Tensor = field(default_factory=lambda: torch.zeros(4096, dtype=torch.int64))
    negative: Tensor = field(default_factory=lambda: torch.zeros(4096, dtype=torch.int64))
    zeros: int = 0
    low: float = 0.0
    high: float = 0.0

    BINS_PER_OCTAVE: ClassVar[int] = 64
    FIRST_EXPONENT: ClassVar[int] = -32

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        if not rows.numel():
            return
        flat = rows.flatten()
        low, high = (float(x) for x in flat.aminmax())
        bins = flat.abs().log2_().sub_(self.FIRST_EXPONENT).mul_(self.BINS_PER_OCTAVE).floor_()
        counted = bins >= 0
        bins = bins.clamp_(0, len(self.positive) - 1).nan_to_num_(0).to(torch.int64)
        self.positive = self.positive + bins[counted & (flat > 0)].bincount(minlength=4096)
        self.negative = self.negative + bins[counted & (flat < 0)].bincount(minlength=4096)
        self.zeros += int(flat.numel() - counted.sum())
        # NaN compares as false, and must not be lost.
        self.low = low if low != low else min(self.low, low)
        self.high = high if high != high else max(self.high, high)

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self.positive = self.positive + other.positive
        self.negative = self.negative + other.negative
        self.zeros += other.zeros
        self.low, self.high = (
            float(f(torch.tensor([a, b])))
            for f, a, b in ((torch.min, self.low, other.low), (torch.max, self.high, other.high))
        )

    @property
    def count(self) -> int:
        """Values seen."""
        return int(self.positive.sum() + self.negative.sum()) + self.zeros

    def magnitudes(self) -> tuple[Tensor, Tensor]:
        """The middle of each bin, float64 [4096], and how many magnitudes lie in it, int64."""
        exponents = torch.arange(len(self.positive), dtype=torch.float64).add_(0.5)
        middles = torch.exp2(exponents / self.BINS_PER_OCTAVE + self.FIRST_EXPONENT)
        return middles, self.positive + self.negative

    def percentile(self, fraction: float) -> float:
        """The magnitude that this fraction of all values does not exceed.

        Args:
            fraction: 0 to 1; 1 is the largest magnitude, exactly.
        """
        largest = max(-self.low, self.high)
        if fraction >= 1:
            return largest
        below = (self.positive + self.negative).cumsum(0) + self.zeros
        index = int(torch.searchsorted(below, torch.tensor(fraction * self.count)))
        if index == 0 and self.zeros >= fraction * self.count:
            return 0.0
        edge: float = 2.0 ** ((index + 1) / self.BINS_PER_OCTAVE + self.FIRST_EXPONENT)
        return min(edge, largest)


@dataclass(eq=False)
class Rows(Statistic):
    """Some rows as they are, evenly spaced in every micro-batch.

    Attributes:
        values: float32 [rows kept, K], in the order of the data.
        every: One row in so many is kept.
    """

    values: Tensor = field(default_factory=_empty)
    every: int = 64

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        self._add(rows[self.every // 2 :: self.every].clone())

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self._add(other.values)

    def _add(self, kept: Tensor) -> None:
        self.values = torch.cat((self.values, kept)) if self.values.numel() else kept


class Routed:
    """One statistic for each expert, of the rows that are routed to it.

    What a micro-batch sees is kept as rows until it is merged: the few that an expert sees are
    smaller than, say, their second moments.

    Args:
        make: Makes an empty statistic.
        experts: Number of experts.

    Attributes:
        parts: The statistic of each expert.
    """

    def __init__(self, make: Callable[[], Statistic], experts: int) -> None:
        self.parts = [make() for _ in range(experts)]
        self._waiting: list[Tensor] = []

    def update(self, rows: Tensor, index: Tensor) -> None:
        """Takes what one micro-batch has.

        Args:
            rows: float32 [T, K], or [T, C, K] with a row for each choice.
            index: The experts of each row, [T, C] int64.
        """
        if rows.ndim == index.ndim:
            rows = rows.unsqueeze(1).expand(*index.shape, rows.shape[-1])
        self._waiting = [rows[index == expert] for expert in range(len(self.parts))]

    def merge(self, other: Routed) -> None:
        """Adds the micro-batch that `other` took."""
        for part, rows in zip(self.parts, other._waiting, strict=True):
            part.update(rows)

    def finite(self) -> bool:
        """Whether all rows were finite."""
        return all(part.finite() for part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        """All that was merged, for the journal."""
        return {
            f"{expert}.{name}": tensor
            for expert, part in enumerate(self.parts)
            for name, tensor in part.tensors().items()
        }

    @classmethod
    def of(cls, kind: type[Statistic], tensors: Mapping[str, Tensor]) -> Routed:
        """The inverse of `tensors`.

        Args:
            kind: Of the statistics.
            tensors: What `tensors` gave.
        """
        by_expert: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            expert, _, name = key.partition(".")
            by_expert.setdefault(int(expert), {})[name] = tensor
        made = cls(kind, len(by_expert))
        made.parts = [kind.of(by_expert[expert]) for expert in range(len(by_expert))]
        return made


def gram(rows: Tensor) -> Tensor:
    """X^T X, float32 [K, K]: half of its blocks are computed, the others mirrored.

    Args:
        rows: float32 [n, K].
    """
    width = rows.shape[1]
    result = torch.empty(width, width)
    for start in range(0, width, _GRAM_BLOCK):
        stop = min(start + _GRAM_BLOCK, width)
        block = rows[:, start:stop].T @ rows[:, :stop]
        result[start:stop, :stop] = block
        result[:start, start:stop] = block[:, :start].T
    return result
