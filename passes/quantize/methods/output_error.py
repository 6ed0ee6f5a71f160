"""The parameters of a group that change its part of the layer's output least."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qcompile.formats.grid import Grid, GroupParameters
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.passes.quantize.methods.sweep import stack_rows

Candidates = Callable[[Grid, Tensor], Iterator[GroupParameters]]
"""Parameters [n, 1] that are worth a try for rows [n, g], by the grid of these rows."""


def output_errors(errors: Tensor, moments: Tensor) -> Tensor:
    """``mean (e x)^2 = e H e^T`` of each row e of errors, [n, 1].

    Args:
        errors: [n, g] float32.
        moments: H, second moments of the inputs, [g, g] float32.
    """
    return ((errors @ moments) * errors).sum(-1, keepdim=True)


def least_output_error(
    grid: Grid, weights: Tensor, moments: Tensor, candidates: Candidates
) -> GroupParameters:
    """The best candidates for a group, row by row.

    Args:
        grid: Bound to the weight.
        weights: [N, g] float32.
        moments: As for `output_errors`.
        candidates: At least one.

    Returns:
        Parameters [N, 1].
    """

    def search(start: int, stop: int) -> GroupParameters:
        rows, part = weights[start:stop], grid.rows(start, stop)

        def error(parameters: GroupParameters) -> Tensor:
            return output_errors(part.round(rows, parameters) - rows, moments)

        tried = candidates(part, rows)
        best = next(tried)
        least = error(best)
        for candidate in tried:
            found = error(candidate)
            best = candidate.where(found < least, best)
            least = torch.minimum(found, least)
        return best

    return stack_rows(map_row_blocks(search, *weights.shape))
