"""Rounding to nearest within ranges that are clipped for the least error of outputs: AWQ's clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.calibration.statistics import Hessian, Statistic
from qcompile.formats import QuantizedWeight
from qcompile.formats.grid import Grid, GroupParameters
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.sweep import stack_rows


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
            parameters = _clipped(grid, weights, moments[group, group].to(torch.float32), task)
            codes[:, group] = grid.nearest(weights, parameters)
            fitted.append(parameters)
        tensors = grid.store(codes, GroupParameters.join(fitted))
        return Outcome(QuantizedWeight(task.format, tuple(task.weight.shape), tensors))


def _clipped(grid: Grid, weights: Tensor, moments: Tensor, task: Task) -> GroupParameters:
    """The parameters of one group ``[N, g]``, whose inputs have second moments ``[g, g]``."""

    def search(start: int, stop: int) -> GroupParameters:
        rows, part = weights[start:stop], grid.rows(start, stop)

        def error(parameters: GroupParameters) -> Tensor:
            errors = part.round(rows, parameters) - rows
            return ((errors @ moments) * errors).sum(-1, keepdim=True)

        candidates = part.candidates(rows, "mse", task.name)
        best = next(candidates)
        least = error(best)
        for candidate in candidates:
            found = error(candidate)
            best = candidate.where(found < least, best)
            least = torch.minimum(found, least)
        return best

    return stack_rows(map_row_blocks(search, *weights.shape))
