"""What a method is that learns the codes of all weights of a block together.

Such a method says what can be learned of a weight, how that changes what the weight stands for, and
how to descend; `qcompile.passes.tune.quantize_blocks` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qcompile.formats import QuantizedWeight
from qcompile.passes.quantize.methods.base import Method, Outcome, Task


class Learnable:
    """Numbers that are learned.

    Args:
        start: Their first values, float32.
        rate: The step size at the start.
        low: The least value; steps that lead past it end there.
        high: The largest value.

    Attributes:
        value: The present numbers, a leaf that asks for gradients.
    """

    def __init__(
        self, start: Tensor, rate: float, low: float = -torch.inf, high: float = torch.inf
    ) -> None:
        self.value = start.detach().clone().requires_grad_()
        self.rate = rate
        self._low, self._high = low, high

    def project(self) -> None:
        """Moves numbers that have left their range back to its end."""
        with torch.no_grad():
            self.value.clamp_(self._low, self._high)

    def assign(self, values: Tensor) -> None:
        """Gives it other numbers."""
        with torch.no_grad():
            self.value.copy_(values)


class WeightLearner(ABC):
    """What is learned of one weight."""

    @property
    @abstractmethod
    def learnables(self) -> Sequence[Learnable]:
        """All numbers that it learns."""

    @abstractmethod
    def decode(self, weight: Tensor) -> Tensor:
        """What the weight will be decoded to, differentiable by `learnables` and by the weight.

        Args:
            weight: float32 [N, K]: the weight as it was, or as transforms have changed it.
        """

    @abstractmethod
    def finish(self, weight: Tensor) -> QuantizedWeight:
        """The tensors that decode to exactly what `decode` returns."""


@dataclass(frozen=True)
class Descent:
    """How a block's learnables go down.

    Attributes:
        rule: ``"sign"`` steps by the sign of the gradient, ``"adam"`` by Adam's rule.
        steps: How many.
        batch: Calibration windows per step.
        decay: Whether rates fall to 0 along a line.
        patience: Steps without a new best loss after which to stop; 0 never stops early.
        activation_bits: Width that the inputs of linears are rounded to, per token; 0 leaves them.
        scale_rate: Rate of the logarithms of the scales of sites; 0 leaves sites as they are.
    """

    rule: Literal["sign", "adam"]
    steps: int
    batch: int
    decay: bool = False
    patience: int = 0
    activation_bits: int = 0
    scale_rate: float = 0.0


class BlockMethod(Method):
    """A method that learns. Weights outside of blocks are rounded to nearest.

    Subclasses are frozen dataclasses; their fields are their options.
    """

    @property
    def needs_data(self) -> bool:
        """It does."""
        return True

    @property
    @abstractmethod
    def descent(self) -> Descent:
        """How to descend."""

    @abstractmethod
    def learner(self, task: Task) -> WeightLearner:
        """What is learned of a weight, at its start.

        Raises:
            RecipeError: The format is none that the method can learn codes of.
        """

    def quantize(self, task: Task) -> Outcome:
        """The codes at the start, with nothing learned."""
        return Outcome(self.learner(task).finish(task.weight))
