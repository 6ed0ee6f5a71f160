"""HQQ: zero points that leave a sparse error, found from the weight alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats import QuantizedWeight
from qcompile.formats.grid import Grid, GroupParameters
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.sweep import stack_rows


@dataclass(frozen=True)
class Hqq(Method):
    """Half-quadratic quantization: shifts each group's grid so that few weights err, but those may.

    Alternates between the sparse error ``e = shrink(w - decoded)`` and the parameters that are best
    for ``w - e``. The paper has zero points that are no whole numbers and moves only those; here
    zero points are stored as whole numbers, so scales move as well. Parameters stay storable
    throughout, and a group keeps the best ones that it has had.

    Attributes:
        norm: The p < 1 of the norm of errors that is minimized.
        steps: Iterations.
        beta: Initial weight of the quadratic term, relative to the scale of the weights.
        growth: What `beta` is multiplied with at each step.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """

    norm: float = 0.7
    steps: int = 20
    beta: float = 10.0
    growth: float = 1.01

    def quantize(self, task: Task) -> Outcome:
        """Searches a block of rows at a time.

        Raises:
            RecipeError: The format is no integer format.
        """
        if not isinstance(task.format, IntegerFormat):
            raise RecipeError(
                f"method 'hqq' shifts evenly spaced grids, and '{task.name}' is to be "
                f"{task.format}",
                remedy="use an integer format such as int4-g64-asym",
            )
        grid = task.grid
        width = task.weight.shape[1]
        codes = torch.empty(task.weight.shape, dtype=torch.uint8)

        def search(start: int, stop: int) -> GroupParameters:
            groups = split_groups(task.weight[start:stop], grid.group_size)
            parameters = self._search(grid, groups, task)
            codes[start:stop] = grid.nearest(groups, parameters).flatten(-2)[:, :width]
            return parameters.squeeze()

        parameters = stack_rows(map_row_blocks(search, *task.weight.shape))
        tensors = grid.store(codes, parameters)
        return Outcome(QuantizedWeight(task.format, tuple(task.weight.shape), tensors))

    def _search(self, grid: Grid, groups: Tensor, task: Task) -> GroupParameters:
        best = current = grid.fit(groups, task.scale_search, name=task.name)
        least = self._loss(grid, groups, best)
        beta = self.beta
        for _ in range(self.steps):
            errors = self._shrink(groups - grid.round(groups, current), beta)
            current = _refit(grid, groups, groups - errors, current, task)
            loss = self._loss(grid, groups, current)
            best = current.where(loss < least, best)
            least = torch.minimum(loss, least)
            beta *= self.growth
        return best

    def _shrink(self, errors: Tensor, beta: float) -> Tensor:
        """The proximal operator of the p-norm, approximately: large errors stay, small ones go."""
        size = errors.abs()
        threshold = size.clamp(min=1e-8).pow(self.norm - 1) / beta
        return errors.sign() * (size - threshold).clamp_(min=0)

    def _loss(self, grid: Grid, groups: Tensor, parameters: GroupParameters) -> Tensor:
        errors = (groups - grid.round(groups, parameters)).abs_()
        return errors.pow_(self.norm).sum(-1, keepdim=True)


def _refit(
    grid: Grid, groups: Tensor, aims: Tensor, parameters: GroupParameters, task: Task
) -> GroupParameters:
    """Zero point, then scale, with which the codes decode nearest to the aims."""
    assert isinstance(task.format, IntegerFormat)
    codes = grid.nearest(groups, parameters).to(torch.float32)
    zero_point = parameters.zero_point
    if zero_point is not None:
        ideal = (codes - aims / parameters.scale).mean(-1, keepdim=True)
        zero_point = ideal.round_().clamp_(0, 2**task.format.bits - 1)
    steps = codes - (2 ** (task.format.bits - 1) if zero_point is None else zero_point)
    norm = steps.square().sum(-1, keepdim=True)
    ideal = (steps * aims).sum(-1, keepdim=True) / norm.clamp(min=1)
    stored = ideal.to(task.format.scale_dtype).to(torch.float32)
    usable = (stored != 0) & stored.isfinite()
    return GroupParameters(torch.where(usable, stored, parameters.scale), zero_point)
