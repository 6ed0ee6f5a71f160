"""SliM-LLM: salient groups of columns get a bit more, and as many others a bit less."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.calibration.statistics import Hessian, Rows, Statistic
from qcompile.formats import IntegerFormat, LookupFormat, ScalarFormat, SplitFormat
from qcompile.formats.scales import FloatScale
from qcompile.formats.split import Part
from qcompile.kernels.lookup.levels import spell_levels
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.parts import sweep_parts, undivided

_BITS = range(2, 8)
_MOST_ROWS = 512
"""Inputs whose outputs are compared."""

_BINARY = spell_levels([-1.0, 1.0])


@dataclass(frozen=True)
class Slim(Gptq):
    """GPTQ with b + 1 bits for the most salient groups of columns and b - 1 for the least.

    Groups are as large as those of the format, over all rows, and as many get a bit more as get one
    less: the bits that all codes take together stay the same. The paper's groups are neighbours,
    and relies on salient columns to be so too. Here columns are grouped by their salience, since
    the places of columns are stored in any case: groups then differ as much as columns do, where
    neighbours of all kinds average out.

    How many groups exchange bits, some of the layer's inputs say: softmaxed outputs of the layer
    are compared (mean KL divergence) for every number, with all columns rounded to nearest. That
    counts tokens alike, where a few giant ones decide about squared errors. The sweep at the best
    number is taken if it serves the outputs better than the one without exchange. With one bit,
    weights are plus or minus the scale of their group.

    Scales weigh errors by the moments of inputs (`weigh_scales`), which stands for the paper's
    salience-weighted calibration. Options are those of `Gptq`.

    Source: Huang et al. 2024, "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large
    Language Models", section 3.
    """

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Hessian, Rows)

    def quantize(self, task: Task) -> Outcome:
        """Chooses the groups, then sweeps; see `sweep_parts`.

        Formats other than integers of 2 to 7 bits in groups are left to `Gptq`, and so are experts.
        """
        base = task.format
        if not isinstance(base, IntegerFormat) or not task.alone:
            return undivided(super().quantize(task), base)
        if not base.group_size or base.bits not in _BITS:
            return undivided(super().quantize(task), base)
        plain = super().quantize(task)
        loss = OutputLoss.of(task)
        falling = torch.argsort(task.weight.square().sum(0) * self._pivots(task), descending=True)
        count = self._best_count(task, base, falling, loss)
        if not count:
            return plain
        exchanged = self._exchanged(task, base, falling, count)
        return min(plain, exchanged, key=lambda outcome: loss(_decoded(outcome)))

    def _exchanged(self, task: Task, base: IntegerFormat, falling: Tensor, count: int) -> Outcome:
        """The sweep where so many groups have a bit more and as many one less."""
        format = SplitFormat(base, (Part(_narrower(base), count), Part(_wider(base), count)))
        moved = count * base.group_size
        high, middle, low = falling.tensor_split((moved, len(falling) - moved))
        outcome = sweep_parts(task, format, (middle, low, high), self)
        groups = len(falling) // base.group_size
        note = f"{count} of {groups} groups have {base.bits + 1} bit, as many {base.bits - 1}"
        return replace(outcome, notes=(*outcome.notes, note))

    def _best_count(
        self, task: Task, base: IntegerFormat, falling: Tensor, loss: OutputLoss
    ) -> int:
        """How many groups should give a bit to how many others; 0 for none.

        Args:
            task: The weight.
            base: Its format.
            falling: Its columns by falling salience.
            loss: What rounding costs the outputs.
        """
        low, middle, high = (
            self._rounded(task, format, falling) for format in (_narrower(base), base, _wider(base))
        )
        back = torch.argsort(falling)

        def loss_of(count: int) -> float:
            moved, last = count * base.group_size, len(falling) - count * base.group_size
            rounded = torch.cat((high[:, :moved], middle[:, moved:last], low[:, last:]), dim=1)
            return loss(rounded[:, back])

        return min(range((len(falling) - 1) // base.group_size // 2 + 1), key=loss_of)

    def _rounded(self, task: Task, format: ScalarFormat, order: Tensor) -> Tensor:
        """The columns in an order, rounded to a format, [N, K]."""
        weight = task.weight[:, order]
        grid = format.grid.bind(weight, task.name)
        groups = split_groups(weight, format.group_size)
        weights = split_groups(task.seen.importance[order], format.group_size)
        fitted = grid.fit(
            groups, "mse", name=task.name, importance=weights if self.weigh_scales else None
        )
        return grid.round(groups, fitted).flatten(-2)[:, : weight.shape[1]]

    def _pivots(self, task: Task) -> Tensor:
        """What is left of the moments of inputs when later ones are known, [K]."""
        found = task.seen.feedback(damping=self.damping, descending=self.act_order, name=task.name)
        pivots = torch.empty_like(found.pivots)
        pivots[found.order] = found.pivots
        return pivots


@dataclass(frozen=True, eq=False)
class OutputLoss:
    """What another weight costs a layer's outputs.

    Attributes:
        task: The weight and its inputs.
        rows: Some inputs, [n, K]; None where none were kept: then squared errors count.
        wanted: Their outputs' logarithms of softmax, [n, N].
    """

    task: Task
    rows: Tensor | None
    wanted: Tensor | None

    @staticmethod
    def of(task: Task) -> OutputLoss:
        """The loss on the rows that were kept of a task's inputs."""
        rows = task.seen.rows
        if rows is None:
            return OutputLoss(task, None, None)
        rows = rows[:: -(-len(rows) // _MOST_ROWS)]
        return OutputLoss(task, rows, (rows @ task.weight.T).log_softmax(-1))

    def __call__(self, decoded: Tensor) -> float:
        """Mean KL divergence of softmaxed outputs, or relative squared error."""
        if self.rows is None or self.wanted is None:
            return self.task.seen.relative_error(self.task.weight, decoded)
        found = (self.rows @ decoded.T).log_softmax(-1)
        divergence = (self.wanted.exp() * (self.wanted - found)).sum(-1)
        return float(divergence.mean(dtype=torch.float64))


def _decoded(outcome: Outcome) -> Tensor:
    return outcome.weight.format.decode(outcome.weight)


def _wider(base: IntegerFormat) -> IntegerFormat:
    return replace(base, bits=base.bits + 1)


def _narrower(base: IntegerFormat) -> ScalarFormat:
    if base.bits > min(_BITS):
        return replace(base, bits=base.bits - 1)
    # Integers of one bit have a level at 0 and one at the other side of it.
    return LookupFormat(_BINARY, base.group_size, FloatScale(base.scale_dtype))
