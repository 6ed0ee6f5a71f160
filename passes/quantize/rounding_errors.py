"""What rounding with scales of the moment costs, format by format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.calibration.statistics import Statistic
from qcompile.passes.quantize.activation_formats import ActivationFormat

if TYPE_CHECKING:
    from typing_extensions import Self

Trial = tuple[ActivationFormat, int]
"""A format, and how many channels share a scale; 0 is all of a token."""


@dataclass(eq=False)
class RoundingErrors(Statistic):
    """Squared errors of some roundings whose scales are measured as values come.

    Attributes:
        trials: The roundings.
        sums: The error of each, over all that was seen, float64 [trials].
    """

    trials: tuple[Trial, ...] = ()
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(self.trials), dtype=torch.float64)

    def update(self, rows: Tensor) -> None:
        """Adds rows, float32 [n, K]."""
        self.sums += torch.stack([_error(rows, *trial) for trial in self.trials])

    def merge(self, other: Self) -> None:
        """Adds all that `other` saw."""
        self.sums += other.sums

    def tensors(self) -> dict[str, Tensor]:
        """The sums; trials are no numbers."""
        return {"sums": self.sums}

    def of_trial(self, format: ActivationFormat, group_size: int) -> float:
        """The error of one of the trials."""
        return float(self.sums[self.trials.index((format, group_size))])


def _error(rows: Tensor, format: ActivationFormat, group_size: int) -> Tensor:
    rounded = format.round(rows, format.covering(rows, group_size), group_size)
    return (rows - rounded).square().sum(dtype=torch.float64)
