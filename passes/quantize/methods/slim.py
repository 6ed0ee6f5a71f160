"""SliM-LLM: salient groups of columns get a bit more, and as many others a bit less."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats import Format, IntegerFormat, LookupFormat, SplitFormat
from qcompile.formats.scales import FloatScale
from qcompile.formats.split import Part
from qcompile.kernels.lookup.levels import spell_levels
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.parts import sweep_parts

_BITS = range(2, 8)
_BINARY = spell_levels([-1.0, 1.0])


@dataclass(frozen=True)
class Slim(Gptq):
    """GPTQ with b + 1 bits for the most salient groups of columns and b - 1 for the least.

    The groups are those of the format, over all rows, and as many get a bit more as get one less:
    the bits that all codes take together stay the same. How many that is, each weight's own errors
    say: the paper compares softmaxed outputs of rounded layers, this compares what the errors of
    the sweep will be, column by column ``D_j |e_j|^2`` (see `Feedback.pivots`), which costs next to
    nothing. A weight for which no exchange pays is left as it is. With one bit, weights are plus or
    minus the scale of their group.

    Scales weigh errors by the moments of inputs (`weigh_scales`), which stands for the paper's
    salience-weighted calibration. The other options are those of `Gptq`.

    Source: Huang et al. 2024, "SliM-LLM: Salience-Driven Mixed-Precision Quantization for Large
    Language Models", section 3.
    """

    def quantize(self, task: Task) -> Outcome:
        """Chooses the groups, then sweeps; see `sweep_parts`.

        Raises:
            RecipeError: The format is no integer format with groups, of 2 to 7 bits.
        """
        base = task.format
        if not isinstance(base, IntegerFormat) or not base.group_size or base.bits not in _BITS:
            raise RecipeError(
                f"method 'slim' moves bits between groups of integers, and '{task.name}' is to be "
                f"{base}",
                remedy="use 2 to 7 bits and groups, such as int2-g64-asym",
            )
        salience = self._salience(task)
        count = self._exchanges(task, base, salience)
        if not count:
            return super().quantize(task)
        format = SplitFormat(base, (Part(_narrower(base), count), Part(_wider(base), count)))
        outcome = sweep_parts(task, format, format.divide(salience), self)
        groups = len(salience) // base.group_size
        note = f"{count} of {groups} groups have {base.bits + 1} bit, as many {base.bits - 1}"
        return replace(outcome, notes=(*outcome.notes, note))

    def _salience(self, task: Task) -> Tensor:
        """What leaving a column out would cost if the others could make up for it, [K].

        Section 3.2: w^2 over the square of the diagonal of the factor of the inverse Hessian.
        """
        return task.weight.square().sum(0) * self._pivots(task)

    def _exchanges(self, task: Task, base: IntegerFormat, salience: Tensor) -> int:
        """How many groups give a bit to how many others."""
        size = base.group_size
        groups = len(salience) // size
        ranked = salience[: groups * size].reshape(groups, size).sum(-1).argsort(descending=True)
        low, middle, high = (
            self._costs(task, format)[: groups * size].reshape(groups, size).sum(-1)[ranked]
            for format in (_narrower(base), base, _wider(base))
        )
        gains = (middle - high).cumsum(0)
        losses = (low - middle).flip(0).cumsum(0)
        balance = (gains - losses)[: (len(salience) - 1) // size // 2]
        if not len(balance) or float(balance.max()) <= 0:
            return 0
        return int(balance.argmax()) + 1

    def _costs(self, task: Task, format: Format) -> Tensor:
        """What the errors of each column in a format will cost the output, [K]."""
        rounded = format.encode(task.weight, scale_search="mse", name=task.name)
        errors = (format.decode(rounded) - task.weight).square().sum(0)
        return errors * self._pivots(task)

    def _pivots(self, task: Task) -> Tensor:
        return task.seen.feedback(damping=self.damping, descending=False, name=task.name).pivots


def _wider(base: IntegerFormat) -> IntegerFormat:
    return replace(base, bits=base.bits + 1)


def _narrower(base: IntegerFormat) -> Format:
    if base.bits > min(_BITS):
        return replace(base, bits=base.bits - 1)
    # Integers of one bit have a level at 0 and one at the other side of it.
    return LookupFormat(_BINARY, base.group_size, FloatScale(base.scale_dtype))
