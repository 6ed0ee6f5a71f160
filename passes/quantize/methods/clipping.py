"""The range of each group of weights, clipped by factors that can be learned."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats.grid import GroupParameters, storable_scale
from qcompile.formats.integer import IntegerFormat
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Task
from qcompile.passes.tune.fake_quantize import straight_through

Extremes = tuple[Tensor, Tensor]
"""Minimum (at most 0) and maximum (at least 0) of each group, ``[..., G, 1]``."""


@dataclass(frozen=True, eq=False)
class Clipping:
    """Scales and zero points of integer weights as functions of clip factors.

    Asymmetric: the range from ``a * min`` to ``b * max`` is spread over all codes. Symmetric: one
    factor says how far the lowest code reaches, in units of the largest magnitude; the sign of the
    scale, which says on which side the lowest code lies, is that of the start.

    Attributes:
        format: What is stored.
        name: What messages call the weight.
        start: The factors that come nearest to what the format's search for scales finds: ``a`` and
            ``b``, or the one; float32 ``[..., G, 1]``.
        limit: The largest factor that makes sense: with it nothing is clipped.
        sign: Of the scales, ``[..., G, 1]``; None where the format is asymmetric.
    """

    format: IntegerFormat
    name: str
    start: tuple[Tensor, ...]
    limit: float
    sign: Tensor | None

    @staticmethod
    def of(task: Task, method: str) -> Clipping:
        """The clipping with which a weight is rounded to nearest.

        Args:
            task: The weight and its format.
            method: What messages call the method.

        Raises:
            RecipeError: The format has no ranges to clip, or zero points that are floats.
        """
        format = task.format
        if not isinstance(format, IntegerFormat):
            raise RecipeError(
                f"method '{method}' learns the ranges of evenly spaced grids, and '{task.name}' is "
                f"to be {format}",
                remedy="use an integer format such as int4-g64",
            )
        if format.has_float_zero_points:
            raise RecipeError(
                f"method '{method}' learns the ranges of grids with whole zero points, and "
                f"'{task.name}' is to be {format}",
                remedy=f"use {replace(format, zero_dtype=torch.uint8)}, or method 'hqq'",
            )
        groups = split_groups(task.weight, format.group_size)
        found = task.grid.fit(groups, task.scale_search, name=task.name)
        low, high = extremes(groups)
        if found.zero_point is None:
            middle = 2 ** (format.bits - 1)
            limit = middle / (middle - 1) if format.bits > 1 else 1.0
            reach = _share(found.scale.abs() * middle, torch.maximum(high, -low), limit)
            return Clipping(format, task.name, (reach,), limit, found.scale.sign())
        ends = (-found.zero_point * found.scale, (_top(format) - found.zero_point) * found.scale)
        start = tuple(_share(e, full, 1.0) for e, full in zip(ends, (low, high), strict=True))
        return Clipping(format, task.name, start, 1.0, None)

    def parameters(self, seen: Extremes, factors: tuple[Tensor, ...]) -> GroupParameters:
        """Scales and zero points, as they are stored and differentiable.

        Args:
            seen: Of the groups.
            factors: Like `start`.

        Returns:
            ``[..., G, 1]`` float32; the zero points of symmetric formats are in it, too.
        """
        low, high = seen
        if self.sign is not None:
            middle = 2 ** (self.format.bits - 1)
            scale = self._stored(torch.maximum(high, -low) * factors[0] * (self.sign / middle))
            return GroupParameters(scale, torch.full_like(self.sign, middle))
        low, high = low * factors[0], high * factors[1]
        scale = self._stored((high - low) / _top(self.format))
        ideal = -low / scale
        return GroupParameters(
            scale, straight_through(ideal, ideal.detach().round().clamp_(0, _top(self.format)))
        )

    def _stored(self, ideal: Tensor) -> Tensor:
        stored = storable_scale(ideal.detach(), self.format.scale_dtype, self.name)
        return straight_through(ideal, stored)


def extremes(groups: Tensor) -> Extremes:
    """Minimum and maximum of groups ``[..., g]``, 0 included."""
    low, high = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    return low.clamp(max=0), high.clamp(min=0)


def _share(part: Tensor, whole: Tensor, limit: float) -> Tensor:
    """What share of the whole a part is; all of it where there is nothing to share."""
    share = torch.where(whole == 0, torch.ones_like(whole), part / whole)
    return share.clamp(0, limit)


def _top(format: IntegerFormat) -> int:
    return int(2**format.bits - 1)
