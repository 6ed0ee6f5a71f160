"""MagR: the largest weights of a row are made smaller where the layer's output does not mind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.calibration.statistics import Hessian, Statistic
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods.base import Method, Outcome, Task
from qcompile.passes.quantize.methods.gptq import Gptq


@dataclass(frozen=True)
class Magr(Method):
    """Shrinks ranges by a proximal descent, then quantizes with GPTQ.

    Attributes:
        alpha: Weight of the largest magnitude against the output error; 0 picks 0.001 for one
            scale per row and 0.0001 for groups.
        steps: Iterations of the descent.
        act_order: See `Gptq`.
        damping: See `Gptq`.

    Source: Zhang et al. 2024, "MagR: Weight Magnitude Reduction for Enhancing Post-Training
    Quantization".
    """

    alpha: float = 0.0
    steps: int = 100
    act_order: bool = False
    damping: float = 0.01

    statistics: ClassVar[tuple[type[Statistic], ...]] = (Hessian,)

    def quantize(self, task: Task) -> Outcome:
        """Shrinks, then sweeps."""
        grouped = task.grid.group_size
        alpha = self.alpha or (1e-4 if grouped else 1e-3)
        weight = reduce_magnitude(
            task.weight, task.seen.hessian.matrix, alpha=alpha, group=grouped, steps=self.steps
        )
        gptq = Gptq(act_order=self.act_order, damping=self.damping)
        return gptq.quantize(replace(task, weight=weight))


def reduce_magnitude(
    weight: Tensor, hessian: Tensor, *, alpha: float, group: int, steps: int
) -> Tensor:
    """Minimizes ``1/2 (w - w0) H (w - w0)^T + alpha |w|_inf`` for each row and group.

    Args:
        weight: w0, float32 [N, K].
        hessian: float64 [K, K]; scaled to a largest eigenvalue of 1 here.
        alpha: Weight of the largest magnitude.
        group: Columns that share a scale; 0 for whole rows.
        steps: Iterations.

    Returns:
        w, float32 [N, K].

    Source: Zhang et al. 2024, algorithm 1.
    """
    matrix = (hessian / torch.linalg.eigvalsh(hessian)[-1].clamp(min=1e-30)).to(torch.float32)
    result = weight
    for _ in range(steps):
        descended = result - (result - weight) @ matrix
        parts = split_groups(descended, group)
        shrunk = parts - alpha * _project_to_l1_ball(parts / alpha)
        result = shrunk.flatten(-2)[:, : weight.shape[1]]
    return result


def _project_to_l1_ball(values: Tensor) -> Tensor:
    """The nearest points with sum |v| <= 1, along the last axis (Duchi et al. 2008)."""
    size = values.abs()
    ordered = size.sort(dim=-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, values.shape[-1] + 1)
    last = (ordered * count > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(-1, last - 1) / last).clamp(min=0)
    return values.sign() * (size - threshold).clamp_(min=0)
