"""OWQ: the columns that quantization hurts most stay 16-bit floats, and make up for the others."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.formats import SplitFormat
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.parts import sweep_parts, undivided


@dataclass(frozen=True)
class Owq(Gptq):
    """GPTQ around *weak* columns, which go to the formats of most bits and are worked on last.

    The format says how many: ``int3-asym+0.77%fp16`` is the paper's 3.1 bit, before scales. A
    column is weak where the error that rounding makes of it meets large inputs:
    ``H_jj |W_j - Q(W_j)|^2``. The paper gives attention and MLP layers different shares; overrides
    of the recipe can.

    Its options are those of `Gptq`.

    Source: Lee et al. 2023, "OWQ: Outlier-Aware Weight Quantization for Efficient Fine-Tuning and
    Inference of Large Language Models".
    """

    def quantize(self, task: Task) -> Outcome:
        """Finds weak columns, then sweeps; see `sweep_parts`. As `Gptq` if there are no parts."""
        format = task.format
        if not isinstance(format, SplitFormat):
            return undivided(super().quantize(task), format)
        rounded = format.base.encode(task.weight, scale_search=task.scale_search, name=task.name)
        errors = (format.base.decode(rounded) - task.weight).square().sum(0)
        return sweep_parts(task, format, format.divide(task.seen.importance * errors), self)
