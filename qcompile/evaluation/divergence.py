"""How far the predictions of a model are from those of a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Divergence:
    """Running sums of two distances between next-token distributions.

    Attributes:
        nats: Sum over positions of KL(reference || model), in nats.
        agreements: Positions where both rank the same token first.
        positions: How many positions were compared.
    """

    nats: float = 0.0
    agreements: int = 0
    positions: int = 0

    def add(self, reference: Tensor, model: Tensor) -> None:
        """Adds positions.

        Args:
            reference: Log probabilities [n, V] float32, normalized.
            model: Those of the model, same shape.
        """
        # Tokens that the reference rules out add nothing, though their logarithm is -infinity.
        ratio = torch.where(reference == -torch.inf, 0.0, reference - model)
        self.nats += float((reference.exp() * ratio).sum(dtype=torch.float64))
        self.agreements += int((reference.argmax(dim=1) == model.argmax(dim=1)).sum())
        self.positions += reference.shape[0]

    @property
    def kl(self) -> float:
        """Mean KL(reference || model) per position, in nats; at least 0."""
        # Rounding can leave the sum of nearly equal distributions just below zero.
        return max(0.0, self.nats / self.positions)

    @property
    def top1_agreement(self) -> float:
        """Fraction of positions where both rank the same token first, 0 to 1."""
        return self.agreements / self.positions
