"""Rounding to nearest within ranges that are clipped for the least error of outputs: AWQ's clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from qcompile.calibration.statistics import Hessian, Statistic
from qcompile.formats import QuantizedWeight
from qcompile.formats.grid import GroupParameters
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.output_error import least_output_error


@dataclass(frozen=True)
class AwqClip(Method):
    """Narrows the range of each group of a row by what that costs in the group's part of outputs.

    For a row w of a group and what it decodes to, q, over the group's inputs x, the range is the
    one with the least ``mean (q x - w x)^2 = (q - w) H (q - w)^T``, H the second moments of x.
    Ranges are those of ``scale_search: mse``, down to half of all. Run it behind the scales of
    `Smooth` with method ``awq``, whose search looks at weights that are not clipped.

    Source: Lin et al. 2023 (AWQ, arXiv 2306.00978) and its code, which leaves queries and keys out;
    here they are clipped like all others, as their error is judged by their outputs as well.
    """

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Hessian,)

    def quantize(self, task: Task) -> Outcome:
        """Searches group by group, a block of rows at a time."""
        grid, width = task.grid, task.weight.shape[1]
        size = grid.group_size or width
        moments = task.seen.hessian.matrix
        codes = torch.empty(task.weight.shape, dtype=torch.uint8)
        fitted = []
        for start in range(0, width, size):
            group = slice(start, min(start + size, width))
            weights = task.weight[:, group].contiguous()
            parameters = least_output_error(
                grid,
                weights,
                moments[group, group].to(torch.float32),
                lambda part, rows: part.candidates(rows, "mse", task.name),
            )
            codes[:, group] = grid.nearest(weights, parameters)
            fitted.append(parameters)
        tensors = grid.store(codes, GroupParameters.join(fitted))
        return Outcome(QuantizedWeight(task.format, tuple(task.weight.shape), tensors))
