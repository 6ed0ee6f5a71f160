"""Gradient descent over rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of steepest descent that stays orthogonal.

    The Cayley transform of the gradient's skew part: ``(1 - a A / 2)^-1 (1 + a A / 2) R`` with
    ``A = B - B^T, B = -G R^T + R (R^T G) R^T / 2`` and ``a = min(rate, 1 / |A|_1)``.

    Args:
        rotation: R, ``[n, n]`` float64.
        gradient: G, of a loss by the entries of R.
        rate: The largest step.

    Returns:
        ``[n, n]`` float64, orthogonal to rounding error; R itself where the gradient is zero.

    Source: Li, Li and Todorovic 2020 (arXiv 2002.01113), with the linear system solved, not
    iterated, as orders are small beside the model.
    """
    gradient = gradient.to(torch.float64)
    half = -gradient @ rotation.T + rotation @ (rotation.T @ gradient) @ rotation.T / 2
    skew = half - half.T
    size = float(torch.linalg.matrix_norm(skew, 1))
    if size == 0:
        return rotation
    step = min(rate, 1 / size) / 2 * skew
    one = torch.eye(len(rotation), dtype=torch.float64)
    moved: Tensor = torch.linalg.solve(one - step, (one + step) @ rotation)
    return moved
