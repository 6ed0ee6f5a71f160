"""Choosing scales and zero points of integer weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats.grid import Grid, GroupParameters, ScaleSearch, storable_scale

# Below half of the range clipping never pays for 2 bits and more of bell-shaped weights.
_NARROWER = tuple(1 - step / 32 for step in range(17))

# How many of its ranges a group may lie away from 0: float16 ends at some 256 of 8-bit codes.
_FARTHEST = 128

# With no finer zero points than that, code - zero_point is exact in float32, on every target.
_ZERO_FRACTIONS = 2.0**12


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Evenly spaced values, (code - zero_point) * scale; see `IntegerFormat` for the fields.

    Asymmetric: the range of a group, widened to include 0, is spread over all codes. Symmetric: two
    scales are tried, max|w| over the largest positive step, and the extreme weight (with its sign)
    over the lowest step, which uses all 2^bits levels. Searches other than ``"absmax"`` try
    narrower ranges as well, and for asymmetric groups those of symmetric ones: weights that are
    clipped seldom need a range of their own kind on each side, and with these no group errs more
    for having a zero point. Every candidate is judged by what it decodes to.

    Zero points that are floats need not widen a range to include 0, and are rounded to float16 as
    scales are to their type.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype
    zero_dtype: torch.dtype = torch.uint8

    def candidates(
        self, groups: Tensor, search: ScaleSearch, name: str
    ) -> Iterator[GroupParameters]:
        """Scales and zero points, [..., 1]; see `Grid.candidates`."""
        for ideal, low in self._ranges(groups, (1.0,) if search == "absmax" else _NARROWER):
            scale = storable_scale(ideal, self.scale_dtype, name)
            zero_point = None if self.symmetric else self.storable_zero_point(-low / scale)
            yield GroupParameters(scale, zero_point)
        if not self.symmetric and search != "absmax":
            for ideal in self._symmetric_scales(groups, _NARROWER):
                scale = storable_scale(ideal, self.scale_dtype, name)
                # Codes that count from the other end stand for a negative scale.
                zero_point = torch.full_like(scale, self._middle).sub_((scale < 0).to(scale.dtype))
                yield GroupParameters(scale.abs(), zero_point)

    def storable_zero_point(self, ideal: Tensor) -> Tensor:
        """Zero points as they are stored, in float32; takes over the memory of `ideal`."""
        if not self.zero_dtype.is_floating_point:
            return self._whole(ideal)
        fractions = ideal.mul_(_ZERO_FRACTIONS).round_().div_(_ZERO_FRACTIONS)
        return fractions.to(self.zero_dtype).to(torch.float32)

    def nearest(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """Codes 0 to 2^bits - 1, uint8."""
        return self._nearest(values, parameters).to(torch.uint8)

    def decode(self, codes: Tensor, parameters: GroupParameters) -> Tensor:
        """(codes - zero_point) * scale, float32."""
        return (codes.to(torch.float32) - self._zero(parameters)).mul_(parameters.scale)

    def round(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """The nearest storable values, without a detour over uint8."""
        steps = self._nearest(values, parameters).sub_(self._zero(parameters))
        return steps.mul_(parameters.scale)

    def store(self, codes: Tensor, parameters: GroupParameters) -> dict[str, Tensor]:
        """``codes``, ``scale`` and, asymmetric, ``zero_point``."""
        tensors = {"codes": codes, "scale": parameters.scale.to(self.scale_dtype)}
        if parameters.zero_point is not None:
            tensors["zero_point"] = parameters.zero_point.to(self.zero_dtype)
        return tensors

    @property
    def _top(self) -> int:
        return int(2**self.bits - 1)

    @property
    def _middle(self) -> int:
        return int(2 ** (self.bits - 1))

    def _zero(self, parameters: GroupParameters) -> Tensor | int:
        return self._middle if parameters.zero_point is None else parameters.zero_point

    def _nearest(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        steps = values / parameters.scale
        if self.zero_dtype.is_floating_point:
            return steps.add_(self._zero(parameters)).round_().clamp_(0, self._top)
        return self._whole(steps, self._zero(parameters))

    def _whole(self, steps: Tensor, zero_point: Tensor | int = 0) -> Tensor:
        """Steps from the zero point as codes, float32; takes over the memory of `steps`."""
        return steps.round_().add_(zero_point).clamp_(0, self._top)

    def _ranges(
        self, groups: Tensor, factors: tuple[float, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Candidate scales before rounding, each with the low end of its range, [..., 1]."""
        low, high = self._extremes(groups)
        if not self.symmetric:
            # Divided before subtracting: the range may be wider than float32 reaches.
            full = high / self._top - low / self._top
            for factor in factors:
                yield full * factor, low * factor
            return
        for ideal in self._symmetric_scales(groups, factors):
            yield ideal, low

    def _extremes(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The range of each group to be covered: with 0 where that has to be a code."""
        least = groups.amin(dim=-1, keepdim=True)
        most = groups.amax(dim=-1, keepdim=True)
        low, high = least.clamp_max(0), most.clamp_min(0)
        if not self.zero_dtype.is_floating_point:
            return low, high
        near = most / 2 - least / 2 >= (high / 2 - low / 2) / _FARTHEST
        return torch.where(near, least, low), torch.where(near, most, high)

    def _symmetric_scales(self, groups: Tensor, factors: tuple[float, ...]) -> Iterator[Tensor]:
        """Candidate scales of symmetric groups before rounding, of either sign, [..., 1]."""
        low = groups.amin(dim=-1, keepdim=True).clamp_max_(0)
        high = groups.amax(dim=-1, keepdim=True).clamp_min_(0)
        extreme = torch.where(high > -low, high, low)
        for factor in factors:
            yield extreme * (factor / -self._middle)
            if self.bits > 1:
                yield extreme.abs() * (factor / (self._middle - 1))
