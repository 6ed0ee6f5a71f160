"""2, 4 and 16 bit in one matrix: blocks of columns by what they cost, single weights by size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats import SparseFormat, SplitFormat
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.parts import sweep_parts, undivided


@dataclass(frozen=True)
class Mixed(Gptq):
    """GPTQ with more bits for blocks of large inputs and wide ranges, and floats beside the rest.

    The format says how many of each, such as ``int2-g16-asym+10%int4-g16-asym/0.4%fp16``. A block
    of columns, over all rows, that has a large product of input moments and squared ranges goes to
    the format of more bits; floats stand beside the weights of the others whose own products are
    the largest. Blocks, and not groups of single rows, keep a kernel's tile in one format. Either
    half may be left out. Its options are those of `Gptq`.

    Source: Li et al. 2024, "Fast and Efficient 2-bit LLM Inference on GPU: 2/4/16-bit in a Weight
    Matrix with Asynchronous Dequantization" (ICCAD).
    """

    def quantize(self, task: Task) -> Outcome:
        """Chooses blocks and floats, then sweeps; see `sweep_parts`.

        A format that is the same for all weights is left to `Gptq`.
        """
        format = task.format
        base = format.base if isinstance(format, SparseFormat) else format
        if isinstance(base, SplitFormat):
            columns = base.divide(self._costs(task, base.block_size))
        else:
            columns = (torch.arange(task.weight.shape[1]),)
        if isinstance(format, SparseFormat):
            scores = task.weight.square() * task.seen.importance
            index = format.largest(_only(scores, columns[0]))
            return sweep_parts(task, format, columns, self, index=index)
        if isinstance(format, SplitFormat):
            return sweep_parts(task, format, columns, self)
        return undivided(super().quantize(task), format)

    def _costs(self, task: Task, block: int) -> Tensor:
        """What rounding a column costs for each bit less, up to a factor, [K]."""
        groups = split_groups(task.weight, block)
        ranges = (groups.amax(-1) - groups.amin(-1)).square().sum(0)
        return task.seen.importance * ranges.repeat_interleave(block)[: task.weight.shape[1]]


def _only(scores: Tensor, columns: Tensor) -> Tensor:
    """Scores of some columns; the others are never among the largest."""
    kept = torch.full_like(scores, -1.0)
    kept[:, columns] = scores[:, columns]
    return kept
