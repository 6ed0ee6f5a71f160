"""The arithmetic of formats that store one code per weight: the interface for all algorithms.

An algorithm that chooses codes itself (an error-compensating sweep, a block optimizer) asks a
format for its `Grid` and needs to know nothing else about the format::

    grid = format.grid.bind(weight)
    for columns in groups:                                  # of `grid.group_size`, the last short
        parameters = grid.fit(weight[:, columns])           # once per group: [N, g]
        for column in columns:                              # column by column: [N, 1]
            codes[:, column] = grid.nearest(weight[:, column], parameters)
            error = weight[:, column] - grid.decode(codes[:, column], parameters)
            ...
    tensors = grid.store(codes, GroupParameters.join(all_parameters))
    QuantizedWeight(format, tuple(weight.shape), tensors)

`Grid.encode` is that loop without a sweep: round to nearest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.kernels.quantize.groups import group_count, split_groups

ScaleSearch = Literal["absmax", "mse", "l2.4"]
"""How a scale is chosen: from the extremes of its group, or, over a range of narrower ones, by the
least sum of squared errors or of errors to the power 2.4."""

_EXPONENTS: dict[ScaleSearch, float] = {"absmax": 2.0, "mse": 2.0, "l2.4": 2.4}

GridT = TypeVar("GridT", bound="Grid")


@dataclass(frozen=True, eq=False)
class GroupParameters:
    """What the weights of a group share, with an axis of length 1 (or G) in place of the group.

    Values are those that the format stores, exactly: codes are chosen for what will be decoded.

    Attributes:
        scale: [..., 1] float32, finite and never 0.
        zero_point: [..., 1] float32, whole numbers unless the format stores floats; None where the
            grid has none.
    """

    scale: Tensor
    zero_point: Tensor | None = None

    @staticmethod
    def join(groups: Iterable[GroupParameters]) -> GroupParameters:
        """The parameters of consecutive groups, [..., 1] each, side by side: [..., G]."""
        listed = list(groups)
        zeros = [group.zero_point for group in listed if group.zero_point is not None]
        scale = torch.cat([group.scale for group in listed], dim=-1)
        return GroupParameters(scale, torch.cat(zeros, dim=-1) if zeros else None)

    def squeeze(self) -> GroupParameters:
        """Without the last axis, of length 1: from [..., G, 1] to [..., G]."""
        zero_point = None if self.zero_point is None else self.zero_point.squeeze(-1)
        return GroupParameters(self.scale.squeeze(-1), zero_point)

    def where(self, better: Tensor, other: GroupParameters) -> GroupParameters:
        """These parameters where `better` [..., 1] is true, others elsewhere."""
        zero_point = None
        if self.zero_point is not None and other.zero_point is not None:
            zero_point = torch.where(better, self.zero_point, other.zero_point)
        return GroupParameters(torch.where(better, self.scale, other.scale), zero_point)


class Grid(ABC):
    """Storable values of a group of weights, given what the group shares.

    Attributes:
        group_size: Weights that share parameters, along the last axis; 0 where all of a row do.
    """

    group_size: int

    @abstractmethod
    def candidates(
        self, groups: Tensor, search: ScaleSearch, name: str
    ) -> Iterator[GroupParameters]:
        """Parameters that are worth a try for groups of weights, at least one.

        Args:
            groups: [..., g] float32, finite; padding is 0.
            search: How scales are chosen.
            name: What error messages call the weight.

        Raises:
            ModelError: A scale is too large for its type.
        """

    @abstractmethod
    def nearest(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """Codes of the nearest storable values.

        Args:
            values: Float32.
            parameters: Broadcast against `values`.

        Returns:
            uint8, of the shape of `values`.
        """

    @abstractmethod
    def decode(self, codes: Tensor, parameters: GroupParameters) -> Tensor:
        """The values of codes, float32; `parameters` broadcast against `codes`."""

    @abstractmethod
    def store(self, codes: Tensor, parameters: GroupParameters) -> dict[str, Tensor]:
        """The tensors of `Format.tensors` for a whole weight.

        Args:
            codes: [..., K] uint8.
            parameters: [..., G].
        """

    def bind(self: GridT, weight: Tensor, name: str = "weight") -> GridT:
        """The grid of one weight, where something is chosen once for all of it.

        That is so where scales have scales of their own. Others return themselves.

        Args:
            weight: [..., K], the whole weight, any float dtype.
            name: What error messages call it.
        """
        del weight, name
        return self

    def rows(self: GridT, start: int, stop: int) -> GridT:
        """The bound grid of a range of rows of its weight, counted in ``weight.reshape(-1, K)``."""
        del start, stop
        return self

    def round(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """The nearest storable values themselves, float32: what fake quantization wants."""
        return self.decode(self.nearest(values, parameters), parameters)

    def fit(
        self,
        groups: Tensor,
        search: ScaleSearch = "absmax",
        *,
        name: str = "weight",
        importance: Tensor | None = None,
    ) -> GroupParameters:
        """The best parameters for groups of weights: those of the least error, group by group.

        Args:
            groups: [..., g] float32, finite; padding is 0.
            search: Which scales are tried and how errors are summed.
            name: What error messages call the weight.
            importance: Factors on the errors of single weights, broadcast against `groups`.

        Returns:
            Parameters [..., 1].

        Raises:
            ModelError: A scale is too large for its type.
        """
        candidates = self.candidates(groups, search, name)
        best = next(candidates)
        least: Tensor | None = None
        for candidate in candidates:
            if least is None:  # a lone candidate needs no error
                least = self._error(groups, best, search, importance)
            error = self._error(groups, candidate, search, importance)
            better = error < least
            best = candidate.where(better, best)
            least = torch.where(better, error, least)
        return best

    def encode(self, weight: Tensor, search: ScaleSearch, name: str) -> dict[str, Tensor]:
        """Rounds a weight to nearest, a block of rows at a time.

        Args:
            weight: [..., K], any float dtype; not written to.
            search: How scales are chosen.
            name: What error messages call the weight.

        Returns:
            The tensors of `Format.tensors`.

        Raises:
            ModelError: The weight is not finite, or a scale is too large for its type.
        """
        rows = weight.reshape(-1, weight.shape[-1])
        leading = weight.shape[:-1]
        bound = self.bind(weight, name)
        codes = torch.empty(rows.shape, dtype=torch.uint8)

        def encode_block(start: int, stop: int) -> GroupParameters:
            block = rows[start:stop].to(torch.float32)
            require_finite(block, name)
            groups = split_groups(block, self.group_size)
            grid = bound.rows(start, stop)
            fitted = grid.fit(groups, search, name=name)
            codes[start:stop] = grid.nearest(groups, fitted).flatten(-2)[:, : rows.shape[1]]
            return fitted.squeeze()

        blocks = map_row_blocks(encode_block, *rows.shape)
        shape = (*leading, group_count(rows.shape[1], self.group_size))
        scale = torch.cat([block.scale for block in blocks]).reshape(shape)
        zeros = [block.zero_point for block in blocks if block.zero_point is not None]
        zero_point = torch.cat(zeros).reshape(shape) if zeros else None
        return bound.store(codes.reshape(weight.shape), GroupParameters(scale, zero_point))

    def _error(
        self,
        groups: Tensor,
        parameters: GroupParameters,
        search: ScaleSearch,
        importance: Tensor | None,
    ) -> Tensor:
        error = self.round(groups, parameters).sub_(groups)
        exponent = _EXPONENTS[search]
        error = error.square_() if exponent == 2.0 else error.abs_().pow_(exponent)
        if importance is not None:
            error = error * importance
        return error.sum(dim=-1, keepdim=True)


def require_finite(block: Tensor, name: str) -> None:
    """Checks that weights can be stored at all.

    Raises:
        ModelError: They are not finite.
    """
    if bool(block.isfinite().all()):
        return
    kind = "NaN" if bool(block.isnan().any()) else "infinity"
    raise ModelError(
        f"weight '{name}' contains {kind}",
        remedy="the checkpoint is damaged, or was saved from a diverged run: get a sound copy",
    )


def storable_scale(ideal: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Ideal scales as a floating type holds them, in float32, never 0.

    A scale that would become zero is the smallest (subnormal) number of the type instead, so very
    small weights may decode to 0; the scale of a group of zeros is 1.

    Args:
        ideal: Float32.
        dtype: float16, bfloat16 or float32.
        name: What error messages call the weight.

    Raises:
        ModelError: A scale is too large for the type.
    """
    stored = ideal.to(dtype).to(torch.float32)
    if not bool(stored.isfinite().all()):
        limit = torch.finfo(dtype).max
        raise ModelError(
            f"weight '{name}' needs a scale of {float(ideal.abs().max()):.3g}, and "
            f"{str(dtype).removeprefix('torch.')} ends at {limit:.6g}",
            remedy="store scales in a wider type: end the format's name in -bf16 or -fp32",
        )
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    stored = torch.where(stored == 0, torch.copysign(torch.tensor(smallest), ideal), stored)
    return torch.where(ideal == 0, torch.ones_like(stored), stored)
