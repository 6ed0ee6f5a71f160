"""Going down the loss of a block, and keeping the best that was seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qcompile.passes.quantize.methods.block import Descent, Learnable


class Problem(Protocol):
    """What is descended.

    Attributes:
        batches: Number of micro-batches.
        learnables: What is learned.
    """

    batches: int
    learnables: list[Learnable]

    def losses(self) -> list[float]:
        """The loss on each micro-batch."""

    def gradients(self, batches: Sequence[int]) -> tuple[list[float], list[Tensor]]:
        """The losses on some of them, and the gradient of their sum by `learnables`."""


@dataclass(frozen=True)
class Descended:
    """What came of it.

    Attributes:
        before: Mean loss at the start.
        after: Mean loss now; no larger.
        steps: Steps that were taken.
    """

    before: float
    after: float
    steps: int


def descend(
    problem: Problem,
    descent: Descent,
    generator: torch.Generator,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> Descended:
    """Moves learnables to the best values that are met on the way down.

    A minibatch is judged by its loss over what the same windows lost at the start, so that easy and
    hard ones can be compared. In the end the best, the last and the first values are compared on
    all data. Where there is no loss to lower, or none that is a number, nothing moves.

    Args:
        problem: Its learnables are changed.
        descent: How to descend.
        generator: Orders the micro-batches.
        on_step: Called after each step.
    """
    learnables = problem.learnables
    at_start = problem.losses()
    before = _mean(at_start)
    if not learnables or not 0 < before < math.inf:
        return Descended(before, before, 0)
    rule = _RULES[descent.rule](learnables)
    start = best = _snapshot(learnables)
    least, least_step, step = 1.0, 0, 0
    minibatches = _minibatches(problem.batches, descent.batch, generator)
    for step in range(descent.steps):
        chosen = next(minibatches)
        losses, gradients = problem.gradients(chosen)
        scale = sum(at_start[batch] for batch in chosen)
        ratio = sum(losses) / scale if scale else 1.0
        if ratio < least:
            least, least_step, best = ratio, step, _snapshot(learnables)
        elif descent.patience and step - least_step >= descent.patience:
            break
        share = 1 - step / descent.steps if descent.decay else 1.0
        rule.step([gradient / (scale or 1.0) for gradient in gradients], share)
        for each in learnables:
            each.project()
        on_step()
    found = []
    for values in (_snapshot(learnables), best):
        _restore(learnables, values)
        found.append((_mean(problem.losses()), values))
    after, values = min(found, key=lambda item: item[0])
    # Written so that a loss that is no number counts as worse.
    after, values = (after, values) if after < before else (before, start)
    _restore(learnables, values)
    return Descended(before, after, step + 1)


class _Rule(Protocol):
    def step(self, gradients: Sequence[Tensor], share: float) -> None:
        """Moves all learnables; rates count with the given share."""


class _Sign:
    """Steps of the rate's length against the sign of each gradient (Bernstein et al. 2018)."""

    def __init__(self, learnables: Sequence[Learnable]) -> None:
        self._learnables = learnables

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], share: float) -> None:
        for each, gradient in zip(self._learnables, gradients, strict=True):
            each.value.sub_(gradient.sign(), alpha=each.rate * share)


class _Adam:
    """Kingma and Ba 2014, as AdamW without decay of the numbers themselves."""

    def __init__(self, learnables: Sequence[Learnable]) -> None:
        self._learnables = learnables
        groups = [{"params": [each.value], "lr": each.rate} for each in learnables]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=False)

    def step(self, gradients: Sequence[Tensor], share: float) -> None:
        groups = self._optimizer.param_groups
        for group, each, gradient in zip(groups, self._learnables, gradients, strict=True):
            group["lr"] = each.rate * share
            each.value.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()


_RULES: dict[str, Callable[[Sequence[Learnable]], _Rule]] = {"sign": _Sign, "adam": _Adam}


def _minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Without end; every micro-batch comes once before any comes again."""
    waiting: list[int] = []
    size = min(size, count)
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        del waiting[:size]


def _snapshot(learnables: Sequence[Learnable]) -> list[Tensor]:
    return [each.value.detach().clone() for each in learnables]


def _restore(learnables: Sequence[Learnable], values: Sequence[Tensor]) -> None:
    for each, value in zip(learnables, values, strict=True):
        each.assign(value)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
