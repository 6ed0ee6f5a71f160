"""GPTQ: rounding column by column, each error made up for by the columns after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.calibration.statistics import Hessian, Statistic
from qcompile.formats import QuantizedWeight, VectorFormat
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.sweep import BLOCK, GridRounder, sweep
from qcompile.passes.quantize.methods.vectors import sweep_vectors


@dataclass(frozen=True)
class Gptq(Method):
    """Minimizes the error of the layer's output over the calibration inputs, greedily.

    Attributes:
        act_order: Whether columns are worked on by falling second moment of their inputs. Groups
            are those of neighbouring columns nevertheless, with scales chosen beforehand.
        static_groups: Whether the scales of a group are chosen for the original weights, and not
            for what they have become when the sweep gets there. `act_order` implies it.
        damping: Fraction of the mean of the Hessian's diagonal added to the diagonal.
        weigh_scales: Whether the search for scales weighs the errors of columns by the second
            moment of their inputs; scales of vector codebooks do not.

    Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers".
    """

    act_order: bool = False
    static_groups: bool = False
    damping: float = 0.01
    weigh_scales: bool = True

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Hessian,)

    def quantize(self, task: Task) -> Outcome:
        """Sweeps over the columns; see `sweep`, and `sweep_vectors` for codes of several."""
        static = self.static_groups or self.act_order
        if isinstance(task.format, VectorFormat):
            return sweep_vectors(
                task, task.format, damping=self.damping, act_order=self.act_order, static=static
            )
        found = task.seen.feedback(damping=self.damping, descending=self.act_order, name=task.name)
        grid = task.grid
        static = static or not grid.group_size
        importance = task.seen.importance if self.weigh_scales else None
        rounder = GridRounder(
            grid, task.weight, task.scale_search, task.name, importance=importance, static=static
        )
        sweep(task.weight, found, rounder, block=BLOCK if static else grid.group_size)
        weight = QuantizedWeight(task.format, tuple(task.weight.shape), rounder.tensors())
        return Outcome(weight, found.notes)
