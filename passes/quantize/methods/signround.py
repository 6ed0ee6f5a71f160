"""SignRound: which way to round, and where to clip, learned by the signs of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.passes.quantize.methods.base import Task
from qcompile.passes.quantize.methods.block import BlockMethod, Descent, WeightLearner
from qcompile.passes.quantize.methods.integer_learner import IntegerLearner, IntegerPlan


@dataclass(frozen=True)
class SignRound(BlockMethod):
    """Learns an offset in -1/2 .. 1/2 before each rounding, and clip factors of each group.

    ``w = (clamp(round(w / s + V) + z) - z) s`` with s and z those of the clipped range. Steps go
    by the sign of the gradient of the block's output error, each shorter than the one before; so a
    weight moves to the next code at most, and only if gradients agree about it for long.

    Attributes:
        steps: Steps per block.
        batch: Calibration windows per step.
        rate: Length of the first step, for offsets and clip factors alike; 0 is ``1 / steps``, with
            which the steps of one direction add up to 1/2.
        patience: Steps without a new best after which a block is done; 0 takes all steps.
        activation_bits: Width of the activations that it is to run with; 0 for float ones.

    Source: Cheng et al. 2023 (SignRound, arXiv 2309.05516), sections 3 and 4.
    """

    steps: int = 200
    batch: int = 8
    rate: float = 0.0
    patience: int = 0
    activation_bits: int = 0

    @property
    def descent(self) -> Descent:
        """Signs, with rates that fall to 0."""
        return Descent(
            "sign",
            self.steps,
            self.batch,
            decay=True,
            patience=self.patience,
            activation_bits=self.activation_bits,
        )

    def learner(self, task: Task) -> WeightLearner:
        """Offsets and clip factors; see `BlockMethod.learner`."""
        rate = self.rate or 1 / max(1, self.steps)
        return IntegerLearner(task, IntegerPlan(rate, rounding_rate=rate), "signround")
