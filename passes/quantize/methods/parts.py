"""The error-compensating sweep over weights whose columns are divided among formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from qcompile.formats import Format, QuantizedWeight, ScalarFormat, SparseFormat, SplitFormat
from qcompile.formats.dense import DenseFormat
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.sweep import BLOCK, GridRounder, Rounder, sweep


def sweep_parts(
    task: Task,
    format: SplitFormat | SparseFormat,
    columns: Sequence[Tensor],
    options: Gptq,
    *,
    index: Tensor | None = None,
) -> Outcome:
    """Rounds the columns of all parts in one sweep, those that stay floats last.

    Codes are chosen in the order of the columns (or as `act_order` says); what their errors ask of
    later columns the float ones take in the end, nearly without an error of their own. Numbers with
    a float beside them count as 0 when scales are chosen, and err by the float's rounding only.

    Args:
        task: The weight and its inputs; its format does not count.
        format: What is stored.
        columns: Of each part, as `SplitFormat.divide` gives them; all, where there are no parts.
        options: Of the sweep; `Gptq` itself knows formats without parts only.
        index: For a `SparseFormat`, the places of the floats, [N, M].

    Source: Lee et al. 2023 (OWQ), section 3; Ashkboos et al. 2023 (QUIK), section 3.
    """
    base = format.base if isinstance(format, SparseFormat) else format
    formats = base.formats if isinstance(base, SplitFormat) else (base,)
    coded = task if index is None else replace(task, weight=task.weight.scatter(1, index, 0.0))
    rounders = [
        _rounder(coded, part, chosen, options)
        for part, chosen in zip(formats, columns, strict=True)
    ]
    runs = list(_runs(task, formats, columns, rounders, options))
    order = torch.cat(runs)
    as_they_stand = torch.equal(order, torch.arange(len(order)))
    found = task.seen.feedback(
        damping=options.damping,
        descending=False,
        name=task.name,
        order=None if as_they_stand else order,  # other weights share the factors of the former
    )
    rounder = PartsRounder(rounders, columns)
    beside = None if index is None else SparseRounder(rounder, index, task.weight.shape[1])
    sweep(task.weight, found, beside or rounder, block=[len(run) for run in runs])
    parts = [
        QuantizedWeight(part, (len(task.weight), len(chosen)), rounder.tensors())
        for part, chosen, rounder in zip(formats, columns, rounders, strict=True)
    ]
    whole = parts[0]
    if isinstance(base, SplitFormat):
        whole = base.join(parts, columns, tuple(task.weight.shape))
    if isinstance(format, SparseFormat) and index is not None and beside is not None:
        whole = format.join(whole, index, beside.lacking.gather(1, index), task.name)
    return Outcome(whole, found.notes)


def undivided(outcome: Outcome, format: Format) -> Outcome:
    """An outcome of a method that divides weights, where the format leaves nothing to divide.

    Recipes give some layers a format of their own, so that is no mistake; a note says so.
    """
    return replace(outcome, notes=(*outcome.notes, f"nothing to divide in {format}"))


class PartRounder(Rounder, Protocol):
    """A rounder of the columns of one part, which it numbers from 0."""

    def tensors(self) -> dict[str, Tensor]:
        """Those of `Format.tensors`, when all columns are rounded."""


class PartsRounder:
    """Rounds each column as the part does that it belongs to; see `Rounder`.

    Args:
        rounders: One for each part.
        columns: Of the weight, for each part.
    """

    def __init__(self, rounders: Sequence[PartRounder], columns: Sequence[Tensor]) -> None:
        self.adapts = any(rounder.adapts for rounder in rounders)
        self.width = 1
        self._owner = {
            column: (rounder, place)
            for rounder, chosen in zip(rounders, columns, strict=True)
            for place, column in enumerate(chosen.tolist())
        }

    def begin(self, columns: Sequence[int], weights: Tensor) -> None:
        """Tells the part of a block, all of whose columns are its own."""
        rounder, _ = self._owner[columns[0]]
        if rounder.adapts:
            rounder.begin([self._owner[column][1] for column in columns], weights)

    def round(self, column: int, target: Tensor) -> Tensor:
        """What the part makes of a column."""
        rounder, place = self._owner[column]
        return rounder.round(place, target)


class SparseRounder:
    """Rounds columns as another one does, but for a few numbers that get a float; see `Rounder`.

    Args:
        inner: Rounds columns; to it, these numbers are 0.
        index: Their places in each row, [N, M].
        columns: K.

    Attributes:
        lacking: What the codes lack, where they have a float, float32 [N, K].
    """

    def __init__(self, inner: Rounder, index: Tensor, columns: int) -> None:
        self.adapts = inner.adapts
        self.width = 1
        self._inner = inner
        self._chosen = torch.zeros(len(index), columns, dtype=torch.bool).scatter(1, index, True)
        self.lacking = torch.zeros(len(index), columns)

    def begin(self, columns: Sequence[int], weights: Tensor) -> None:
        """Tells the other one about its block."""
        self._inner.begin(columns, weights.masked_fill(self._chosen.T[list(columns)], 0.0))

    def round(self, column: int, target: Tensor) -> Tensor:
        """Codes and floats together."""
        chosen = self._chosen[:, column : column + 1]
        decoded = self._inner.round(column, target.masked_fill(chosen, 0.0))
        lacking = torch.where(chosen, target - decoded, 0.0)
        self.lacking[:, column : column + 1] = lacking
        return decoded + lacking.to(torch.float16).to(torch.float32)


class DenseRounder:
    """Keeps columns as floats; see `Rounder`.

    Args:
        format: Of the floats.
        shape: Of the part.
        name: What messages call the weight.
    """

    adapts = False
    width = 1

    def __init__(self, format: DenseFormat, shape: tuple[int, int], name: str) -> None:
        self._format = format
        self._name = name
        self._values = torch.empty(shape)

    def begin(self, columns: Sequence[int], weights: Tensor) -> None:
        """Nothing to choose."""

    def round(self, column: int, target: Tensor) -> Tensor:
        """The nearest float of the format."""
        self._values[:, column : column + 1] = target
        return target.to(self._format.dtype).to(torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        """``values``."""
        return dict(self._format.encode(self._values, name=self._name).tensors)


def _rounder(task: Task, part: Format, columns: Tensor, options: Gptq) -> PartRounder:
    weight = task.weight[:, columns]
    if isinstance(part, DenseFormat):
        return DenseRounder(part, (len(weight), len(columns)), task.name)
    assert isinstance(part, ScalarFormat)
    return GridRounder(
        part.grid.bind(weight, task.name),
        weight,
        task.scale_search,
        task.name,
        importance=task.seen.importance[columns] if options.weigh_scales else None,
        static=options.static_groups or options.act_order or not part.group_size,
    )


def _runs(
    task: Task,
    formats: Sequence[Format],
    columns: Sequence[Tensor],
    rounders: Sequence[PartRounder],
    options: Gptq,
) -> Iterator[Tensor]:
    """Columns in the order in which they are worked on; none of a run is of another part."""
    coded, dense = [], []
    for part, chosen, rounder in zip(formats, columns, rounders, strict=True):
        if isinstance(part, DenseFormat):
            dense += chosen.split(BLOCK)
        else:
            coded += chosen.split(part.group_size if rounder.adapts else BLOCK)
    if options.act_order:
        falling = torch.cat(coded)
        moments = task.seen.hessian.matrix.diagonal()[falling]
        yield from falling[torch.argsort(moments, descending=True, stable=True)].split(BLOCK)
    else:
        yield from sorted(coded, key=lambda run: int(run[0]))
    yield from dense
