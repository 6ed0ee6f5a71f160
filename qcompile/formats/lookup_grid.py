"""Choosing scales and codes of weights that are looked up in a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.formats.grid import Grid, GroupParameters, ScaleSearch, require_finite
from qcompile.formats.nearest_level import NearestLevel, nearest_level, take
from qcompile.formats.scales import BoundScales
from qcompile.kernels.lookup.levels import levels
from qcompile.kernels.quantize.groups import split_groups

_STEPS = 32
_SMALL = 2.0**-126


@dataclass(frozen=True, eq=False)
class LookupGrid(Grid):
    """Any values, levels[code] * scale; see `LookupFormat` for the fields.

    The widest scale tried is the least that covers the group: no weight lies outside of the levels.
    Searches other than ``"absmax"`` try narrower ones as well, down to half of it, or, for up to
    four levels, a fifth: the coarser the levels, the more it pays to clip the tails.

    Attributes:
        table: Name or numbers of the levels.
        group_size: Weights per scale.
        scales: How scales are stored, with the outer ones of the weight that the grid is bound to.
    """

    table: str
    group_size: int
    scales: BoundScales

    def bind(self, weight: Tensor, name: str = "weight") -> LookupGrid:
        """With outer scales chosen; see `Grid.bind`.

        Raises:
            ModelError: The weight is not finite.
        """
        if not self.scales.needs_outer:
            return self
        rows = weight.reshape(-1, weight.shape[-1]).to(torch.float32)
        require_finite(rows, name)
        ideal = self._covering(split_groups(rows, self.group_size)).squeeze(-1)
        return replace(self, scales=self.scales.bind(ideal))

    def rows(self, start: int, stop: int) -> LookupGrid:
        """The bound grid of a range of rows."""
        return replace(self, scales=self.scales.rows(start, stop))

    def candidates(
        self, groups: Tensor, search: ScaleSearch, name: str
    ) -> Iterator[GroupParameters]:
        """Scales [..., 1]; see `Grid.candidates`."""
        return self.scaled(groups, self._factors(search), name)

    def scaled(
        self, groups: Tensor, factors: Sequence[float], name: str
    ) -> Iterator[GroupParameters]:
        """The least scales that cover groups, [..., 1], times factors, as they can be stored.

        Args:
            groups: As for `candidates`.
            factors: Below 1 the largest weights are clipped.
            name: What error messages call the weight.

        Raises:
            ModelError: A scale is too large for its type.
        """
        covering = self._covering(groups)
        for factor in factors:
            for scale in self.scales.storable(covering * factor, name):
                yield GroupParameters(scale)

    def nearest(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """Codes of the nearest levels, uint8."""
        return self._nearest.codes(values / parameters.scale)

    def decode(self, codes: Tensor, parameters: GroupParameters) -> Tensor:
        """levels[code] * scale, float32."""
        table = torch.tensor(levels(self.table), dtype=torch.float32)
        return take(table, codes.to(torch.int32)).mul_(parameters.scale)

    def round(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """The nearest storable values, without a detour over codes."""
        return self._nearest.round(values / parameters.scale).mul_(parameters.scale)

    def store(self, codes: Tensor, parameters: GroupParameters) -> dict[str, Tensor]:
        """``codes`` and the tensors of the scales."""
        return {"codes": codes, **self.scales.store(parameters.scale)}

    def _covering(self, groups: Tensor) -> Tensor:
        """The least scale whose levels reach from the least to the largest weight, [..., 1]."""
        bottom, top = float(self._nearest.values[0]), float(self._nearest.values[-1])
        covering = torch.zeros_like(groups[..., :1])
        if top > 0:
            covering = torch.maximum(covering, groups.amax(dim=-1, keepdim=True) / top)
        if bottom < 0:
            covering = torch.maximum(covering, groups.amin(dim=-1, keepdim=True) / bottom)
        if 0.0 not in self._nearest.values:  # nothing but the scale can make a group of zeros small
            covering.clamp_(min=_SMALL)
        return covering

    def _factors(self, search: ScaleSearch) -> tuple[float, ...]:
        if search == "absmax":
            return (1.0,)
        least = 0.5 if len(self._nearest.values) > 4 else 0.2
        return tuple(1 - step / _STEPS for step in range(int((1 - least) * _STEPS) + 1))

    @property
    def _nearest(self) -> NearestLevel:
        return nearest_level(self.table)
