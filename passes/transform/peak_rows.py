"""The rows of an activation that are hardest to quantize."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.calibration.statistics import Statistic

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(eq=False)
class LargestRows(Statistic):
    """The rows of largest magnitude: what decides about a scale that all tokens share.

    In language models these are often those of the first token of a text, thousands of times as
    large as others.

    Attributes:
        values: float32 [rows kept, K], the largest first.
        keep: How many rows are kept.
    """

    values: Tensor = field(default_factory=lambda: torch.empty(0))
    keep: int = 64

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        self._add(rows)

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self._add(other.values)

    def _add(self, rows: Tensor) -> None:
        rows = torch.cat((self.values, rows)) if self.values.numel() else rows
        if rows.numel():
            worst = torch.argsort(rows.abs().amax(1), descending=True, stable=True)
            self.values = rows[worst[: self.keep]]


@dataclass(eq=False)
class PeakRows(LargestRows):
    """The rows whose largest magnitude is largest relative to their root mean square.

    With a scale per token, the error of a row relative to its size grows with this ratio and with
    nothing else. Each row is kept divided by its root mean square.
    """

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        super().update(unit_rows(rows))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their root mean square; rows of zeros stay zeros."""
    size = rows.square().mean(1, keepdim=True).sqrt()
    return rows / torch.where(size > 0, size, torch.ones_like(size))
