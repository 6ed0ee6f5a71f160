"""What can be learned of integer weights: where ranges are clipped, and which way to round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats import QuantizedWeight
from qcompile.formats.grid import GroupParameters
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Task
from qcompile.passes.quantize.methods.block import Learnable, WeightLearner
from qcompile.passes.quantize.methods.clipping import Clipping, extremes
from qcompile.passes.tune.fake_quantize import fake_quantize, quantized_codes

_HALF = 0.5


@dataclass(frozen=True)
class IntegerPlan:
    """What is learned of integer weights.

    Attributes:
        clip_rate: Rate of the clip factors.
        rounding_rate: Rate of the offsets before rounding; 0 rounds to nearest.
        logistic: Whether clip factors are learned through the logistic function.
    """

    clip_rate: float
    rounding_rate: float = 0.0
    logistic: bool = False


class IntegerLearner(WeightLearner):
    """Clip factors per group, and an offset per weight that moves it across to the next code.

    Args:
        task: The weight, its format and where the search for scales starts.
        plan: What is learned.
        method: What messages call the method.

    Raises:
        RecipeError: The format is no integer format.
    """

    def __init__(self, task: Task, plan: IntegerPlan, method: str) -> None:
        self._clipping = Clipping.of(task, method)
        self._logistic = plan.logistic
        self._group_size = self._clipping.format.group_size
        self._top = 2**self._clipping.format.bits - 1
        self._start = task.weight
        groups = split_groups(task.weight, self._group_size)
        self._extremes = extremes(groups)
        limit = self._clipping.limit
        if plan.logistic:
            starts = [_logit(start, limit) for start in self._clipping.start]
            self._factors = [Learnable(start, plan.clip_rate) for start in starts]
        else:
            self._factors = [
                Learnable(start, plan.clip_rate, 0.0, limit) for start in self._clipping.start
            ]
        self._offset: Learnable | None = None
        if plan.rounding_rate:
            self._offset = Learnable(torch.zeros_like(groups), plan.rounding_rate, -_HALF, _HALF)

    @property
    def learnables(self) -> Sequence[Learnable]:
        """Factors, then offsets."""
        return self._factors if self._offset is None else [*self._factors, self._offset]

    def decode(self, weight: Tensor) -> Tensor:
        """See `WeightLearner.decode`."""
        groups = split_groups(weight, self._group_size)
        found, zero_point = self._parameters(weight, groups)
        decoded = fake_quantize(groups, self._moved(), found.scale, zero_point, self._top)
        return decoded.flatten(-2)[..., : weight.shape[-1]]

    @torch.no_grad()
    def finish(self, weight: Tensor) -> QuantizedWeight:
        """See `WeightLearner.finish`."""
        format = self._clipping.format
        groups = split_groups(weight, self._group_size)
        found, zero_point = self._parameters(weight, groups)
        codes = quantized_codes(groups, self._moved(), found.scale, zero_point, self._top)
        codes = codes.flatten(-2)[..., : weight.shape[-1]].contiguous()
        if format.symmetric:
            found = GroupParameters(found.scale)
        tensors = format.grid.store(codes, found.squeeze())
        return QuantizedWeight(format, tuple(weight.shape), tensors)

    def _parameters(self, weight: Tensor, groups: Tensor) -> tuple[GroupParameters, Tensor]:
        seen = self._extremes if weight is self._start else extremes(groups)
        factors = [factor.value for factor in self._factors]
        if self._logistic:
            factors = [self._clipping.limit * factor.sigmoid() for factor in factors]
        found = self._clipping.parameters(seen, tuple(factors))
        assert found.zero_point is not None
        return found, found.zero_point

    def _moved(self) -> Tensor | None:
        return None if self._offset is None else self._offset.value


_NEARLY_ALL = 0.982
"""The logistic function of 4: where OmniQuant starts with ranges that are not clipped."""


def _logit(factor: Tensor, limit: float) -> Tensor:
    return (factor / limit).clamp(1 - _NEARLY_ALL, _NEARLY_ALL).logit()
