"""Perplexity: how surprised a model is by a text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Perplexity:
    """Running sum of the negative log-likelihood of predicted tokens.

    Attributes:
        nats: Sum over positions, in nats.
        positions: How many tokens were predicted.
    """

    nats: float = 0.0
    positions: int = 0

    def add(self, log_probabilities: Tensor, targets: Tensor) -> None:
        """Adds predicted positions.

        Args:
            log_probabilities: [n, V] float32, normalized.
            targets: [n] int64, the tokens that did follow.
        """
        likelihood = log_probabilities.gather(1, targets.unsqueeze(1))
        self.nats -= float(likelihood.sum(dtype=torch.float64))
        self.positions += targets.numel()

    @property
    def value(self) -> float:
        """exp(mean negative log-likelihood); infinity past the range of a float."""
        try:
            return math.exp(self.nats / self.positions)
        except OverflowError:
            return math.inf
