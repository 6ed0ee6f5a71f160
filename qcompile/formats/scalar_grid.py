"""Choosing scales, zero points and codes of integer weights: round-to-nearest.

Every candidate is judged by what it decodes to: scales are rounded to their storage type first,
and the squared error is that of the stored values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.formats.base import ScaleSearch
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.kernels.quantize.groups import group_count, split_groups

SHRINK_FACTORS: dict[ScaleSearch, tuple[float, ...]] = {
    "absmax": (1.0,),
    # Below half of the range clipping never pays for 2 bits and more of bell-shaped weights.
    "mse": tuple(1 - step / 32 for step in range(17)),
}
"""Fractions of a group's range that a search tries."""


@dataclass(frozen=True, eq=False)
class RoundedTensors:
    """What rounding a weight [..., K] gives.

    Attributes:
        codes: uint8 [..., K].
        scale: [..., G], in its storage type.
        zero_point: uint8 [..., G], or None for symmetric formats.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class ScalarGrid:
    """The arithmetic of an integer format; see `IntegerFormat` for the fields."""

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype

    def round(self, weight: Tensor, search: ScaleSearch, name: str) -> RoundedTensors:
        """Rounds a weight to nearest, a block of rows at a time.

        Asymmetric: the range of a group, widened to include 0, is spread over all codes.
        Symmetric: the better, group by group and by squared error, of two scales: max|w| over the
        largest positive step, and the extreme weight (with its sign) over the lowest step, which
        uses all 2^bits levels. With ``search="mse"`` narrower ranges are tried as well.

        A group of zeros gets scale 1. A scale that its type would round to zero becomes the
        smallest (subnormal) number of the type, so very small weights may decode to 0.

        Args:
            weight: [..., K], any float dtype; not written to.
            search: How scales are chosen.
            name: What error messages call the weight.

        Raises:
            ModelError: The weight is not finite, or a scale is too large for its type.
        """
        rows = weight.reshape(-1, weight.shape[-1])
        groups = group_count(rows.shape[1], self.group_size)
        codes = torch.empty(rows.shape, dtype=torch.uint8)
        scale = torch.empty((rows.shape[0], groups), dtype=self.scale_dtype)
        zero_point = torch.empty((rows.shape[0], groups), dtype=torch.uint8)

        def round_block(start: int, stop: int) -> None:
            block = rows[start:stop].to(torch.float32)
            _require_finite(block, name)
            grouped = split_groups(block, self.group_size)
            best_scale, best_zero = self.fit(grouped, search, name)
            chosen = self.nearest(grouped, best_scale, best_zero)
            codes[start:stop] = chosen.flatten(-2)[:, : rows.shape[1]]
            scale[start:stop] = best_scale.squeeze(-1)
            zero_point[start:stop] = best_zero.squeeze(-1)

        map_row_blocks(round_block, *rows.shape)
        leading = weight.shape[:-1]
        return RoundedTensors(
            codes.reshape(weight.shape),
            scale.reshape(*leading, groups),
            None if self.symmetric else zero_point.reshape(*leading, groups),
        )

    def fit(self, grouped: Tensor, search: ScaleSearch, name: str) -> tuple[Tensor, Tensor]:
        """Scales and zero points for groups of weights.

        Args:
            grouped: [..., size], float32, finite; padding is 0.
            search: How scales are chosen.
            name: What error messages call the weight.

        Returns:
            Scale and zero point, both [..., 1] float32 holding values that their storage types
            represent exactly.

        Raises:
            ModelError: A scale is too large for its type.
        """
        candidates = [
            (self._storable(ideal, name), low)
            for ideal, low in self._ranges(grouped, SHRINK_FACTORS[search])
        ]
        fitted = [(scale, self._zero_point(scale, low)) for scale, low in candidates]
        best_scale, best_zero = fitted[0]
        if len(fitted) == 1:
            return best_scale, best_zero
        least = self._squared_error(grouped, best_scale, best_zero)
        for scale, zero in fitted[1:]:
            error = self._squared_error(grouped, scale, zero)
            better = error < least
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            least = torch.where(better, error, least)
        return best_scale, best_zero

    def nearest(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes of the nearest storable values, as float32, 0 to 2^bits - 1.

        Args:
            values: Float32 values.
            scale: Broadcasts against `values`.
            zero_point: Broadcasts against `values`, float32.
        """
        return values.div(scale).round_().add_(zero_point).clamp_(0, self._top)

    @property
    def _top(self) -> int:
        return int(2**self.bits - 1)

    @property
    def _middle(self) -> int:
        return int(2 ** (self.bits - 1))

    def _ranges(
        self, grouped: Tensor, factors: tuple[float, ...]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Candidate scales before rounding, each with the low end of its range, [..., 1]."""
        low = grouped.amin(dim=-1, keepdim=True).clamp_max_(0)
        high = grouped.amax(dim=-1, keepdim=True).clamp_min_(0)
        if not self.symmetric:
            # Divided before subtracting: the range may be wider than float32 reaches.
            full = high / self._top - low / self._top
            for factor in factors:
                yield full * factor, low * factor
            return
        extreme = torch.where(high > -low, high, low)
        for factor in factors:
            yield extreme * (factor / -self._middle), low
            if self.bits > 1:
                yield extreme.abs() * (factor / (self._middle - 1)), low

    def _zero_point(self, scale: Tensor, low: Tensor) -> Tensor:
        if self.symmetric:
            return torch.full_like(scale, self._middle)
        return (-low / scale).round_().clamp_(0, self._top)

    def _storable(self, ideal: Tensor, name: str) -> Tensor:
        """Ideal scales as their storage type holds them, in float32, never 0."""
        stored = ideal.to(self.scale_dtype).to(torch.float32)
        if not bool(stored.isfinite().all()):
            limit = torch.finfo(self.scale_dtype).max
            raise ModelError(
                f"weight '{name}' needs a scale of {float(ideal.abs().max()):.3g}, and "
                f"{str(self.scale_dtype).removeprefix('torch.')} ends at {limit:.6g}",
                remedy="store scales in a wider type: end the format's name in -bf16 or -fp32",
            )
        smallest = torch.finfo(self.scale_dtype).smallest_normal * torch.finfo(self.scale_dtype).eps
        stored = torch.where(stored == 0, torch.copysign(torch.tensor(smallest), ideal), stored)
        return torch.where(ideal == 0, torch.ones_like(stored), stored)

    def _squared_error(self, grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        decoded = self.nearest(grouped, scale, zero).sub_(zero).mul_(scale)
        return decoded.sub_(grouped).square_().sum(dim=-1, keepdim=True)


def _require_finite(block: Tensor, name: str) -> None:
    if bool(block.isfinite().all()):
        return
    kind = "NaN" if bool(block.isnan().any()) else "infinity"
    raise ModelError(
        f"weight '{name}' contains {kind}",
        remedy="the checkpoint is damaged, or was saved from a diverged run: get a sound copy",
    )
