"""LLM-FP4: how many exponent bits a weight's floats have, and where their range ends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.calibration.statistics import Hessian, Statistic
from qcompile.formats import Format, LookupFormat, QuantizedWeight
from qcompile.formats.grid import Grid, GroupParameters
from qcompile.formats.lookup_grid import LookupGrid
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.output_error import (
    Candidates,
    least_output_error,
    output_errors,
)

_SMALL_FLOAT = re.compile(r"e([0-9])m([0-9])")


@dataclass(frozen=True)
class LlmFp4(Method):
    """Searches the split into exponent and mantissa bits, and real-valued exponent biases.

    Of a format such as ``fp4`` only the width counts: each weight becomes ``e1m2``, ``e2m1`` or
    ``e3m0``, whichever changes the layer's output least on the calibration inputs. So does the
    exponent bias of each row (or group), a real number, which is a scale: ``2^-bias``. Biases are
    tried from `below` under the one that just covers the largest weight to `above` over it, where
    the largest weights are clipped. (The paper multiplies the bias by 100 factors from 0.01 to 1.2;
    most of these lie outside of this range, where nothing is to be had.)

    Activations are not this method's concern: the paper's pre-shifted biases for them are powers of
    two per channel, the rule ``preshift`` of `Smooth`, and `QuantizeActivations` searches the rest.

    Attributes:
        above: The largest bias tried, in octaves over the covering one.
        below: The smallest, in octaves under it.
        steps: Biases per octave.

    Source: Liu et al. 2023, "LLM-FP4: 4-Bit Floating-Point Quantized Transformers" (arXiv
    2310.16836), sections 3 and 4.1.
    """

    above: float = 1.0
    below: float = 0.25
    steps: int = 16

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Hessian,)

    def quantize(self, task: Task) -> Outcome:
        """Tries every split; weights that a recipe gives other formats are rounded to nearest.

        The matrices of a stack share the format that they are given: only biases are searched.
        """
        formats = splits(task.format)
        if not formats:
            rounded = task.format.encode(
                task.weight, scale_search=task.scale_search, name=task.name
            )
            return Outcome(rounded, (f"{task.format} is no small float: rounded to nearest",))
        moments = task.seen.hessian.matrix.to(torch.float32)
        if not task.alone:
            formats = [format for format in formats if format == task.format]
        tried = (self._quantize(task, format, moments) for format in formats)
        _, best = min(tried, key=lambda found: found[0])
        return Outcome(best)

    def _quantize(
        self, task: Task, format: LookupFormat, moments: Tensor
    ) -> tuple[float, QuantizedWeight]:
        """The error of the layer's output with one split, and the weight."""
        weight = task.weight
        width = weight.shape[1]
        grid, size = format.grid.bind(weight, task.name), format.group_size or width
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        fitted, error = [], 0.0
        for start in range(0, width, size):
            group = slice(start, min(start + size, width))
            rows, part = weight[:, group].contiguous(), moments[group, group]
            parameters = least_output_error(grid, rows, part, self._candidates(task))
            codes[:, group] = grid.nearest(rows, parameters)
            errors = grid.decode(codes[:, group], parameters) - rows
            error += float(output_errors(errors, part).sum(dtype=torch.float64))
            fitted.append(parameters)
        tensors = grid.store(codes, GroupParameters.join(fitted))
        return error, QuantizedWeight(format, tuple(weight.shape), tensors)

    def _candidates(self, task: Task) -> Candidates:
        first, last = -round(self.below * self.steps), round(self.above * self.steps)
        # The covering bias comes first: of equally good ones it is taken.
        biases = sorted(range(first, last + 1), key=abs)
        factors = [2.0 ** (-bias / self.steps) for bias in biases]

        def candidates(grid: Grid, rows: Tensor) -> Iterator[GroupParameters]:
            assert isinstance(grid, LookupGrid)
            return grid.scaled(rows, factors, task.name)

        return candidates


def splits(format: Format) -> list[LookupFormat]:
    """What a format of small floats may become: all splits of as many bits. None of others."""
    match = _SMALL_FLOAT.fullmatch(format.table) if isinstance(format, LookupFormat) else None
    if match is None:
        return []
    assert isinstance(format, LookupFormat)
    bits = int(match[1]) + int(match[2])
    return [replace(format, table=f"e{e}m{bits - e}") for e in range(1, bits + 1)]
