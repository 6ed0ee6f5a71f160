"""Rotations of sites, trained on the loss of the model with rounded activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.analysis.families import PortRole
from qcompile.analysis.roles import weight_name
from qcompile.analysis.sites import Site
from qcompile.formats import Format
from qcompile.ir.program import Program
from qcompile.passes.tune.cayley import cayley_step
from qcompile.passes.tune.differentiable import (
    RoundedRun,
    inner_linears,
    next_token_loss,
    round_weight_straight_through,
)
from qcompile.progress import Progress

_JUDGED = 4
"""Micro-batches on which rotations before and after are compared, kept from training if there are
more than twice as many."""


@dataclass(frozen=True)
class TrainingPlan:
    """How rotations are trained.

    Attributes:
        bits: Width that activations are rounded to, per token.
        weights: What weights are rounded to, to the nearest; None leaves them.
        steps: Micro-batches seen, one step each; data is repeated as often as it takes.
        rate: The largest step over the rotations, at the start; it falls to 0 along a cosine.
    """

    bits: int
    weights: Format | None
    steps: int
    rate: float


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of training.

    Attributes:
        rotations: ``[n, n]`` float64 of each site.
        before: Loss with the rotations at the start, in nats per token.
        after: Loss with these.
    """

    rotations: tuple[Tensor, ...]
    before: float
    after: float


def train_rotations(
    program: Program,
    sites: Sequence[Site],
    start: Sequence[Tensor],
    batches: Sequence[Sequence[Tensor]],
    plan: TrainingPlan,
    progress: Progress,
) -> Trained:
    """Rotations of sites that lower the next-token loss of the model with rounded activations.

    Weights stay as they are, but for the rotations and for rounding; all blocks of a site share
    one. If training does not lower the loss, the rotations are those at the start.

    Args:
        program: A language model with bare norms; it is not changed.
        sites: Where rotations are legal.
        start: ``[n, n]`` float64 for each site, orthogonal.
        batches: Inputs of the program.
        plan: How to train.
        progress: Told of each step.

    Raises:
        ModelError: The program is no language model, or its loss is not finite.
    """
    model = _Rotated(program, sites, plan)
    judged = batches[-_JUDGED:]
    seen = batches[:-_JUDGED] if len(batches) > 2 * _JUDGED else batches
    rotations = list(start)
    before = model.mean_loss(rotations, judged)
    progress.stage("train rotations", plan.steps)
    for step in range(plan.steps):
        rate = plan.rate * (1 + math.cos(math.pi * step / plan.steps)) / 2
        gradients = model.gradients(rotations, seen[step % len(seen)])
        pairs = zip(rotations, gradients, strict=True)
        rotations = [cayley_step(rotation, gradient, rate) for rotation, gradient in pairs]
        progress.advance(1)
    after = model.mean_loss(rotations, judged)
    if not after < before:
        return Trained(tuple(start), before, before)
    return Trained(tuple(rotations), before, after)


class _Rotated:
    """A program as a function of the rotations of its sites."""

    def __init__(self, program: Program, sites: Sequence[Site], plan: TrainingPlan) -> None:
        self._program = program
        self._plan = plan
        self._inner = {weight_name(linear) for linear in inner_linears(program)}
        self._cache: dict[str, Tensor] = {}
        self._stretches: dict[str, list[tuple[int, int, int, int]]] = {}
        for index, site in enumerate(sites):
            for port in site.ports:
                if port.role is not PortRole.CACHE:
                    stretch = (port.axis, port.start, port.size, index)
                    along = self._stretches.setdefault(port.weight, [])
                    if stretch not in along:
                        along.append(stretch)

    def mean_loss(self, rotations: Sequence[Tensor], batches: Sequence[Sequence[Tensor]]) -> float:
        narrow = [rotation.to(torch.float32) for rotation in rotations]
        losses = [self._loss(narrow, batch) for batch in batches]
        return sum(float(loss) for loss in losses) / len(losses)

    def gradients(self, rotations: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [rotation.to(torch.float32).requires_grad_() for rotation in rotations]
        return torch.autograd.grad(self._loss(leaves, batch), leaves)

    def _loss(self, rotations: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
        def rotated(name: str, weight: Tensor) -> Tensor:
            for axis, start, size, index in self._stretches.get(name, ()):
                weight = _rotate_stretch(weight, axis, start, size, rotations[index])
            if self._plan.weights is not None and name in self._inner:
                weight = round_weight_straight_through(weight, self._plan.weights)
            return weight

        run = RoundedRun(self._program, self._plan.bits, rotated, self._cache)
        with torch.enable_grad():
            return next_token_loss(self._program, run, batch)


def _rotate_stretch(weight: Tensor, axis: int, start: int, size: int, rotation: Tensor) -> Tensor:
    along = weight.movedim(axis, -1)
    before, part, behind = along.tensor_split((start, start + size), dim=-1)
    return torch.cat((before, part @ rotation, behind), dim=-1).movedim(-1, axis)
