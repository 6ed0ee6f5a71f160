"""The rows of an activation that are hardest to quantize per token."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.calibration.statistics import Statistic


@dataclass(eq=False)
class PeakRows(Statistic):
    """The rows whose largest magnitude is largest relative to their root mean square.

    With a scale per token, the error of a row relative to its size grows with this ratio and with
    nothing else.

    Attributes:
        values: Each divided by its root mean square: float32 [rows kept, K], the worst first.
        keep: How many rows are kept.
    """

    values: Tensor = field(default_factory=lambda: torch.empty(0))
    keep: int = 64

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        self._add(unit_rows(rows))

    def merge(self, other: PeakRows) -> None:
        """Adds all that `other` saw."""
        self._add(other.values)

    def _add(self, rows: Tensor) -> None:
        rows = torch.cat((self.values, rows)) if self.values.numel() else rows
        if rows.numel():
            worst = torch.argsort(rows.abs().amax(1), descending=True, stable=True)
            self.values = rows[worst[: self.keep]]


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their root mean square; rows of zeros stay zeros."""
    size = rows.square().mean(1, keepdim=True).sqrt()
    return rows / torch.where(size > 0, size, torch.ones_like(size))
