"""OmniQuant: ranges and equivalent scales, learned together."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.passes.quantize.methods.base import Task
from qcompile.passes.quantize.methods.block import BlockMethod, Descent, WeightLearner
from qcompile.passes.quantize.methods.integer_learner import IntegerLearner, IntegerPlan


@dataclass(frozen=True)
class OmniQuant(BlockMethod):
    """Learns how far the range of each group is clipped, and scales inside of each block.

    Clip factors are logistic functions of what is learned; weights are rounded to nearest. Scales
    are those of the sites that a block owns: between a norm and what reads it, values and the
    layer behind attention, queries and keys (one scale for channels that a rotary embedding pairs,
    which keeps the function), up and down. They start at 1: a `smooth` step before starts them
    elsewhere. The norms, biases and weights around a site absorb its scales.

    Attributes:
        steps: Steps per block.
        batch: Calibration windows per step.
        clip_rate: Rate of the clip factors.
        scale_rate: Rate of the logarithms of scales; 0 learns clip factors only.
        patience: Steps without a new best after which a block is done; 0 takes all steps.
        activation_bits: Width of the activations that it is to run with; 0 for float ones.

    Source: Shao et al. 2023 (OmniQuant, arXiv 2308.13137), section 3.
    """

    steps: int = 200
    batch: int = 8
    clip_rate: float = 1e-2
    scale_rate: float = 5e-3
    patience: int = 0
    activation_bits: int = 0

    @property
    def descent(self) -> Descent:
        """Adam, at constant rates."""
        return Descent(
            "adam",
            self.steps,
            self.batch,
            patience=self.patience,
            activation_bits=self.activation_bits,
            scale_rate=self.scale_rate,
        )

    def learner(self, task: Task) -> WeightLearner:
        """Clip factors; see `BlockMethod.learner`."""
        return IntegerLearner(task, IntegerPlan(self.clip_rate, logistic=True), "omniquant")
