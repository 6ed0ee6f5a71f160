"""What was seen of the inputs of each matrix of a weight, from the statistics of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.calibration.requests import Request, Statistics
from qcompile.calibration.statistics import Hessian, Rows
from qcompile.passes.quantize.methods.hessian import Inputs


@dataclass(frozen=True, eq=False)
class Seen:
    """What was seen of the inputs of one matrix.

    Attributes:
        inputs: What its codes are chosen for.
        rows: How many rows it met.
        notes: What the user should know.
    """

    inputs: Inputs
    rows: int
    notes: tuple[str, ...] = ()


def seen_inputs(found: Statistics, requests: Sequence[Request]) -> list[Seen]:
    """The inputs of all places that use a weight, added up, for each of its matrices.

    An expert that met fewer rows than its inputs have channels cannot tell these apart: it is given
    as many rows as are missing of the kind that all experts met, in the mean.

    Args:
        found: The second moments of what was requested, and perhaps some of its rows.
        requests: One for each place; all routed or none.

    Returns:
        One entry, or one for each expert.
    """
    if requests[0].routing is None:
        total = _total([found.of(request.value, Hessian) for request in requests])
        return [Seen(Inputs(total, _rows(found, requests)), total.count)]
    places = [found.of_experts(request.value, Hessian) for request in requests]
    experts = [_total(hessians) for hessians in zip(*places, strict=True)]
    everyone = _total(experts)
    return [_completed(expert, everyone) for expert in experts]


def _rows(found: Statistics, requests: Sequence[Request]) -> Tensor | None:
    """Some of the rows, where any were kept."""
    kept = [found.collected.get((request.value.name, Rows, (-1,))) for request in requests]
    values = [rows.values for rows in kept if isinstance(rows, Rows) and rows.values.numel()]
    return torch.cat(values) if values else None


def _total(hessians: Sequence[Hessian]) -> Hessian:
    if len(hessians) == 1:
        return hessians[0]
    total = Hessian()
    for hessian in hessians:
        total.merge(hessian)
    return total


def _completed(expert: Hessian, everyone: Hessian) -> Seen:
    missing = len(everyone.sum) - expert.count
    if missing <= 0 or not everyone.count:
        return Seen(Inputs(expert), expert.count)
    added = everyone.matrix.mul_(missing)
    total = Hessian(
        added.add_(expert.sum) if expert.count else added, expert.count + missing, everyone.peak
    )
    note = "few tokens were routed here, so what all experts read counts as well"
    return Seen(Inputs(total), expert.count, (note,))
