"""The error-compensating sweep: columns are rounded one by one, and later ones make up for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from qcompile.formats.grid import Grid, GroupParameters, ScaleSearch
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.kernels.quantize.groups import group_count
from qcompile.passes.quantize.methods.hessian import Feedback

BLOCK = 128
"""Columns whose errors reach the columns after them by one matrix product."""


class Rounder(Protocol):
    """What a sweep asks of whoever rounds.

    Attributes:
        adapts: Whether it wants to know what blocks of columns have become.
        width: Columns that it rounds at a time; they stand side by side in the order of the sweep.
    """

    adapts: bool
    width: int

    def begin(self, columns: Sequence[int], weights: Tensor) -> None:
        """Tells what a block of columns, [columns, N], would be if it were not rounded."""

    def round(self, column: int, target: Tensor) -> Tensor:
        """Rounds columns from one on, [N, width]; returns what will be decoded."""


def sweep(
    weight: Tensor, feedback: Feedback, rounder: Rounder, *, block: int | Sequence[int] = BLOCK
) -> Tensor:
    """Rounds a weight column by column so that the layer's output changes least.

    Each column's target is its weight plus what the errors of the columns before it ask for. This
    is LDLQ; GPTQ computes the same numbers from the inverse of the Hessian.

    Args:
        weight: float32 [N, K].
        feedback: From the Hessian of the inputs; its order is that of the columns.
        rounder: Rounds columns; it is told original column numbers.
        block: Columns per block, or those of each block, multiples of the rounder's width;
            rounding, not results, depends on it.

    Returns:
        The errors, weight - decoded, float32 [N, K].

    Source: Chee et al. 2023 (QuIP), section 3, equation 2; Frantar et al. 2022 for the blocks.
    """
    order: list[int] = feedback.order.tolist()
    lower = feedback.lower
    exact = weight.T[feedback.order].contiguous()
    errors = torch.empty_like(exact)
    for start, stop in _blocks(len(order), block):
        asked = lower[start:stop, :start] @ errors[:start]
        if rounder.adapts:
            rounder.begin(order[start:stop], exact[start:stop] + _unrounded(lower, asked, start))
        targets = exact[start:stop] + asked
        for column in range(start, stop, rounder.width):
            columns = slice(column, column + rounder.width)
            target = targets[column - start : column - start + rounder.width]
            if column > start:
                target = _plus_product(target, lower[columns, start:column], errors[start:column])
            if rounder.width > 1:
                target = exact[columns] + _unrounded(lower, target - exact[columns], column)
            decoded = rounder.round(order[column], target.T)
            torch.sub(exact[columns], decoded.T, out=errors[columns])
    result = torch.empty_like(weight)
    result[:, feedback.order] = errors.T
    return result


def _blocks(columns: int, block: int | Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where blocks start and stop."""
    sizes = [block] * -(-columns // block) if isinstance(block, int) else block
    stops = [min(stop, columns) for stop in accumulate(sizes)]
    return pairwise([0, *stops])


def _plus_product(target: Tensor, lower: Tensor, errors: Tensor) -> Tensor:
    """``target + lower @ errors``, [columns, N]."""
    if len(target) == 1:  # one column at a time is what takes a sweep its time
        return target[0].addmv(errors.T, lower[0]).unsqueeze(0)
    return torch.addmm(target, lower, errors)


def _unrounded(lower: Tensor, asked: Tensor, start: int) -> Tensor:
    """How columns move if each does what all columns before it ask for, these included.

    Args:
        lower: Of the feedback.
        asked: What the columns before these ask of them, [columns, N].
        start: The first one.
    """
    inner = lower[start : start + len(asked), start : start + len(asked)]
    moved: Tensor = torch.linalg.solve_triangular(inner, asked, upper=False, unitriangular=True)
    return moved


class GridRounder:
    """Rounds columns to a scalar grid and remembers codes and parameters.

    Args:
        grid: Bound to the weight.
        weight: float32 [N, K].
        search: How scales are chosen.
        name: What messages call the weight.
        importance: Factors on the errors of columns in the search for scales, [K]; or None.
        static: Whether parameters are those of the weight as it is given. Otherwise those of a
            group are chosen when the sweep gets there, for what its columns have become; blocks
            must then be groups, in order.

    Attributes:
        adapts: The opposite of `static`.
        width: 1.
        codes: uint8 [N, K].
    """

    def __init__(
        self,
        grid: Grid,
        weight: Tensor,
        search: ScaleSearch,
        name: str,
        *,
        importance: Tensor | None = None,
        static: bool = True,
    ) -> None:
        self._grid = grid
        self._search: ScaleSearch = search
        self._name = name
        self._importance = importance
        self.adapts = not static
        self.width = 1
        self._size = grid.group_size or weight.shape[1]
        self.codes = torch.empty(weight.shape[::-1], dtype=torch.uint8).T
        self._groups: list[GroupParameters | None] = [None] * group_count(
            weight.shape[1], self._size
        )
        if static:
            for group in range(len(self._groups)):
                self._fit(group, weight[:, group * self._size : (group + 1) * self._size])

    @property
    def parameters(self) -> GroupParameters:
        """Of all groups, [N, G]."""
        return GroupParameters.join(group for group in self._groups if group is not None)

    def begin(self, columns: Sequence[int], weights: Tensor) -> None:
        """Chooses the parameters of a group."""
        self._fit(columns[0] // self._size, weights.T)

    def round(self, column: int, target: Tensor) -> Tensor:
        """The nearest storable values; see `Rounder.round`."""
        parameters = self._groups[column // self._size]
        assert parameters is not None
        codes = self._grid.nearest(target, parameters)
        self.codes[:, column : column + 1] = codes
        return self._grid.decode(codes, parameters)

    def tensors(self) -> dict[str, Tensor]:
        """Those of `Format.tensors`, when all columns are rounded."""
        return self._grid.store(self.codes.contiguous(), self.parameters)

    def _fit(self, group: int, weights: Tensor) -> None:
        start = group * self._size
        importance = self._importance
        if importance is not None:
            importance = importance[start : start + weights.shape[1]]

        def fit(first: int, last: int) -> GroupParameters:
            return self._grid.rows(first, last).fit(
                weights[first:last].contiguous(),
                self._search,
                name=self._name,
                importance=importance,
            )

        self._groups[group] = stack_rows(map_row_blocks(fit, *weights.shape))


def stack_rows(blocks: Sequence[GroupParameters]) -> GroupParameters:
    """The parameters of consecutive ranges of rows, one below the other."""
    zeros = [block.zero_point for block in blocks if block.zero_point is not None]
    scale = torch.cat([block.scale for block in blocks])
    return GroupParameters(scale, torch.cat(zeros) if zeros else None)
