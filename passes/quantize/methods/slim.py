"""SliM-LLM: salient groups of columns get a bit more, and as many others a bit less."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.formats import IntegerFormat, LookupFormat, ScalarFormat, SplitFormat
from qcompile.formats.scales import FloatScale
from qcompile.formats.split import Part
from qcompile.kernels.lookup.levels import spell_levels
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.parts import sweep_parts, undivided

_BITS = range(2, 8)
_BINARY = spell_levels([-1.0, 1.0])


@dataclass(frozen=True)
class Slim(Gptq):
    """GPTQ with b + 1 bits for the most salient groups of columns and b - 1 for the least.

    The groups are those of the format, over all rows, and as many get a bit more as get one less:
    the bits that all codes take together stay the same. How many that is, each weight's own errors
    say. The paper compares softmaxed outputs of rounded layers for every number; here the errors
    that a sweep will make are foretold column by column, ``D_j |e_j|^2`` (see `Feedback.pivots`),
    which costs next to nothing, and the best few numbers are tried. With no exchange at all among
    them, no weight fares worse than with GPTQ on the data that was seen. With one bit, weights are
    plus or minus the scale of their group.

    Scales weigh errors by the moments of inputs (`weigh_scales`), which stands for the paper's
    salience-weighted calibration. The other options are those of `Gptq`.

    Attributes:
        trials: Numbers of groups to try beside none.

    Source: Huang et al. 2024, "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large
    Language Models", section 3.
    """

    trials: int = 2

    def quantize(self, task: Task) -> Outcome:
        """Chooses the groups, then sweeps; see `sweep_parts`.

        Formats other than integers of 2 to 7 bits in groups are left to `Gptq`, and so are experts.
        """
        base = task.format
        if not isinstance(base, IntegerFormat) or not task.alone:
            return undivided(super().quantize(task), base)
        if not base.group_size or base.bits not in _BITS:
            return undivided(super().quantize(task), base)
        pivots = self._pivots(task)
        salience = task.weight.square().sum(0) * pivots
        outcomes = [super().quantize(task)]
        for count in self._promising(task, base, salience, pivots):
            format = SplitFormat(base, (Part(_narrower(base), count), Part(_wider(base), count)))
            outcome = sweep_parts(task, format, format.divide(salience), self)
            groups = len(salience) // base.group_size
            note = f"{count} of {groups} groups have {base.bits + 1} bit, as many {base.bits - 1}"
            outcomes.append(replace(outcome, notes=(*outcome.notes, note)))

        def error(outcome: Outcome) -> float:
            quantized = outcome.weight
            return task.seen.relative_error(task.weight, quantized.format.decode(quantized))

        return min(outcomes, key=error)

    def _promising(
        self, task: Task, base: IntegerFormat, salience: Tensor, pivots: Tensor
    ) -> list[int]:
        """How many groups should give a bit to how many others, the likeliest numbers."""
        size = base.group_size
        groups = len(salience) // size
        ranked = salience[: groups * size].reshape(groups, size).sum(-1).argsort(descending=True)
        low, middle, high = (
            (self._errors(task, format) * pivots)[: groups * size].reshape(groups, size).sum(-1)
            for format in (_narrower(base), base, _wider(base))
        )
        gains = (middle - high)[ranked].cumsum(0)
        losses = (low - middle)[ranked].flip(0).cumsum(0)
        balance = (gains - losses)[: (len(salience) - 1) // size // 2]
        best = balance.topk(min(self.trials, len(balance))).indices
        return [int(place) + 1 for place in best]

    def _errors(self, task: Task, format: ScalarFormat) -> Tensor:
        """Squared errors of the columns when they are rounded to a format, [K]."""
        grid = format.grid.bind(task.weight, task.name)
        groups = split_groups(task.weight, format.group_size)
        weights = split_groups(task.seen.importance, format.group_size)
        fitted = grid.fit(
            groups, "mse", name=task.name, importance=weights if self.weigh_scales else None
        )
        errors = (grid.round(groups, fitted) - groups).square().sum(0)
        return errors.flatten()[: task.weight.shape[1]]

    def _pivots(self, task: Task) -> Tensor:
        """What is left of the moments of inputs when later ones are known, [K]."""
        found = task.seen.feedback(damping=self.damping, descending=self.act_order, name=task.name)
        pivots = torch.empty_like(found.pivots)
        pivots[found.order] = found.pivots
        return pivots


def _wider(base: IntegerFormat) -> IntegerFormat:
    return replace(base, bits=base.bits + 1)


def _narrower(base: IntegerFormat) -> ScalarFormat:
    if base.bits > min(_BITS):
        return replace(base, bits=base.bits - 1)
    # Integers of one bit have a level at 0 and one at the other side of it.
    return LookupFormat(_BINARY, base.group_size, FloatScale(base.scale_dtype))
