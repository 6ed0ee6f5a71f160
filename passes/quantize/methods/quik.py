"""QUIK: the columns of the largest inputs stay 16-bit floats, and so do these inputs."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.formats import SplitFormat
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.parts import sweep_parts, undivided


@dataclass(frozen=True)
class Quik(Gptq):
    """GPTQ around *outlier* columns, whose inputs `quantize_activations` leaves as they are.

    The format says how many: ``int4+256xfp16`` are the paper's 256. They are the columns whose
    inputs have had the largest magnitudes on the calibration data, whatever the weights; layers
    that share an input share them. They are worked on last and make up for the others. Without
    them in the way, one scale per token does for 4-bit activations.

    The paper takes no outliers where all inputs are small, and 8 bit for the layer behind the gate:
    overrides of the recipe do that. Its options are those of `Gptq`.

    Source: Ashkboos et al. 2023, "QUIK: Towards End-to-End 4-Bit Inference on Generative Large
    Language Models", section 3.
    """

    def quantize(self, task: Task) -> Outcome:
        """Finds outliers, then sweeps; see `sweep_parts`. As `Gptq` where there are no parts."""
        format = task.format
        if not isinstance(format, SplitFormat):
            return undivided(super().quantize(task), format)
        return sweep_parts(task, format, format.divide(task.seen.hessian.peak), self)
