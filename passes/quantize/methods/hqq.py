"""HQQ: zero points with which the errors of a group cancel out, found from the weight alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats import QuantizedWeight
from qcompile.formats.grid import GroupParameters
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.integer_grid import IntegerGrid
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.sweep import stack_rows


@dataclass(frozen=True)
class Hqq(Method):
    """Half-quadratic quantization: moves each group's grid to where its weights are.

    Alternates between the sparse error ``e = shrink(w - decoded)`` and the zero point that is best
    for ``w - e``; scales stay. In the end codes stay, and what is stored beside them becomes the
    best for them in squared error: zero points that are floats, such as the paper's
    (``int4-g64-asym16``), leave errors whose sum is 0; where they are codes or there are none,
    scales alone follow.

    It begins with a whole zero point and ends soon, so that 0 stays next to a value: further steps
    lower the squared error of the weights, and what a model predicts gets no better by them.

    Attributes:
        norm: The p < 1 of the norm of errors that is minimized.
        steps: How often the zero point moves.
        beta: Initial weight of the quadratic term: of 10, errors below 0.17 are made up for whole.
        growth: What `beta` is multiplied with at each step.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """

    norm: float = 0.7
    steps: int = 1
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
                remedy="use an integer format such as int4-g64-asym16",
            )
        grid = task.format.grid
        width = task.weight.shape[1]
        codes = torch.empty(task.weight.shape, dtype=torch.uint8)
        counted = split_groups(torch.ones(1, width), grid.group_size)

        def search(start: int, stop: int) -> GroupParameters:
            groups = split_groups(task.weight[start:stop], grid.group_size)
            fitted = grid.fit(groups, task.scale_search, name=task.name)
            fitted = self._moved(grid, groups, counted, fitted)
            chosen = grid.nearest(groups, fitted)
            codes[start:stop] = chosen.flatten(-2)[:, :width]
            return _refitted(grid, groups, counted, chosen.to(torch.float32), fitted).squeeze()

        parameters = stack_rows(map_row_blocks(search, *task.weight.shape))
        tensors = grid.store(codes, parameters)
        return Outcome(QuantizedWeight(task.format, tuple(task.weight.shape), tensors))

    def _moved(
        self, grid: IntegerGrid, groups: Tensor, counted: Tensor, start: GroupParameters
    ) -> GroupParameters:
        """The zero points of the last step."""
        if start.zero_point is None:
            return start
        beta = self.beta
        found = replace(start, zero_point=start.zero_point.round())
        for _ in range(self.steps):
            codes = grid.nearest(groups, found).to(torch.float32)
            errors = self._shrink(groups - grid.decode(codes, found), beta)
            ideal = _mean(codes - (groups - errors) / found.scale, counted)
            found = replace(found, zero_point=grid.storable_zero_point(ideal))
            beta *= self.growth
        return found

    def _shrink(self, errors: Tensor, beta: float) -> Tensor:
        """The proximal operator of the p-norm, approximately: large errors stay, small ones go."""
        size = errors.abs()
        threshold = size.clamp(min=1e-8).pow(self.norm - 1) / beta
        return errors.sign() * (size - threshold).clamp_(min=0)


def _refitted(
    grid: IntegerGrid, groups: Tensor, counted: Tensor, codes: Tensor, found: GroupParameters
) -> GroupParameters:
    """The parameters with which codes decode nearest to the weights, by squared error.

    Args:
        grid: Says what can be stored.
        groups: ``[..., G, g]``.
        counted: 0 for what is padding, 1 elsewhere; ``[1, G, g]``.
        codes: Those of `groups`, float32.
        found: What they were chosen for, which stays where nothing better can be stored.
    """
    if not grid.zero_dtype.is_floating_point:
        middle = 2 ** (grid.bits - 1) if found.zero_point is None else found.zero_point
        return replace(found, scale=_scale(grid, groups, counted, codes - middle, found.scale))
    mean_code, mean = _mean(codes, counted), _mean(groups, counted)
    scale = _scale(grid, groups, counted, codes - mean_code, found.scale)
    zero_point = grid.storable_zero_point(mean_code - mean / scale)
    usable = zero_point.isfinite()
    return GroupParameters(scale, zero_point).where(usable, found)


def _scale(
    grid: IntegerGrid, groups: Tensor, counted: Tensor, steps: Tensor, otherwise: Tensor
) -> Tensor:
    """The factor that takes steps nearest to the weights, as it is stored."""
    steps = steps * counted
    norm = steps.square().sum(-1, keepdim=True)
    stored = ((steps * groups).sum(-1, keepdim=True) / norm).to(grid.scale_dtype)
    ideal = stored.to(torch.float32)
    return torch.where((ideal != 0) & ideal.isfinite(), ideal, otherwise)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Of each group, without its padding: ``[..., G, 1]``."""
    return (values * counted).sum(-1, keepdim=True) / counted.sum(-1, keepdim=True)
