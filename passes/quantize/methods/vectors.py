"""The error-compensating sweep over codes that stand for a few columns each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.formats import QuantizedWeight, VectorFormat
from qcompile.formats.grid import ScaleSearch
from qcompile.formats.nearest_vector import nearest_vectors
from qcompile.formats.row_blocks import map_row_blocks
from qcompile.kernels.lookup_vectors.reference import codebook_tensor, turn
from qcompile.kernels.quantize.groups import group_count
from qcompile.passes.quantize.methods.base import Outcome, Task
from qcompile.passes.quantize.methods.hessian import Feedback
from qcompile.passes.quantize.methods.sweep import BLOCK, sweep


def sweep_vectors(
    task: Task, format: VectorFormat, *, damping: float, act_order: bool, static: bool
) -> Outcome:
    """Rounds a weight vector by vector, in the basis that its codebook is made for.

    There the layer multiplies turned inputs with turned weights, so that second moments are turned
    on both sides, and everything else is as for scalars: what the vectors before ask for, the
    nearest code for it, and the error for those behind.

    Args:
        task: The weight and its inputs.
        format: What is stored.
        damping: See `Gptq`.
        act_order: Whether vectors are worked on by falling second moments of their inputs.
        static: Whether scales are those of the weight as it is given.

    Source: Frantar et al. 2022 for the sweep; van Baalen et al. 2024, "GPTVQ" (arXiv 2402.15319),
    section 3, for vectors in it.
    """
    width = task.weight.shape[1]
    block = format.block(width)
    weight = turn(task.weight, block) if block else task.weight
    seen = task.seen.turned(block) if block else task.seen
    order = None
    if act_order:
        moments = seen.importance.reshape(-1, format.dimension).sum(1)
        falling = torch.argsort(moments, descending=True, stable=True)
        order = torch.arange(width).reshape(-1, format.dimension)[falling].flatten()
    found = seen.feedback(damping=damping, descending=False, name=task.name, order=order)
    static = static or not format.group_size
    rounder = VectorRounder(format, weight, task.scale_search, task.name, found, static=static)
    sweep(weight, found, rounder, block=BLOCK if static else format.group_size)
    return Outcome(
        QuantizedWeight(format, tuple(task.weight.shape), rounder.tensors()), found.notes
    )


class VectorRounder:
    """Rounds the columns of a vector together; see `Rounder`.

    The nearest code is the one by which the error of the output grows least, in this step: with D
    and L of the vector's columns, errors e count ``|sqrt(D) (L + I) e|^2``.

    Args:
        format: Its codebook and groups.
        weight: In the basis of the codebook, float32 [N, K].
        search: How scales are chosen.
        name: What messages call the weight.
        feedback: That of the sweep; the columns of a vector stand side by side in its order.
        static: As for `GridRounder`.

    Attributes:
        width: Columns of a vector.
        adapts: The opposite of `static`.
    """

    def __init__(
        self,
        format: VectorFormat,
        weight: Tensor,
        search: ScaleSearch,
        name: str,
        feedback: Feedback,
        *,
        static: bool,
    ) -> None:
        self.width = format.dimension
        self.adapts = not static
        self._format = format
        self._search: ScaleSearch = search
        self._name = name
        rows, columns = weight.shape
        self._size = format.group_size or columns
        self._codes = torch.empty(rows, columns // self.width, dtype=torch.uint8)
        self._scale = torch.empty(rows, group_count(columns, self._size))
        self._metrics = _metrics(feedback, self.width)
        if static:
            for start in range(0, columns, self._size):
                self._fit(start, weight[:, start : start + self._size])

    def begin(self, columns: Sequence[int], weights: Tensor) -> None:
        """Chooses the scales of a group."""
        self._fit(columns[0], weights.T)

    def round(self, column: int, target: Tensor) -> Tensor:
        """The vectors that serve the output best; see `Rounder.round`."""
        group = column // self._size
        scale = self._scale[:, group : group + 1]
        metric = self._metrics[column]
        table = codebook_tensor(self._format.codebook)
        codes, _ = nearest_vectors((target / scale) @ metric.T, table @ metric.T)
        self._codes[:, column // self.width] = codes
        return table.index_select(0, codes.to(torch.int32)) * scale

    def tensors(self) -> dict[str, Tensor]:
        """Those of `Format.tensors`, when all columns are rounded."""
        return {"codes": self._codes, "scale": self._scale.to(self._format.scale_dtype)}

    def _fit(self, start: int, weights: Tensor) -> None:
        def fit(first: int, last: int) -> Tensor:
            rows = weights[first:last].contiguous()
            return self._format.fit_scales(rows, self._search, self._name)

        scale = torch.cat(map_row_blocks(fit, *weights.shape))
        self._scale[:, start // self._size : start // self._size + 1] = scale


def _metrics(feedback: Feedback, width: int) -> dict[int, Tensor]:
    """``sqrt(D) (L + I)`` of each vector's columns, [width, width], by its first column."""
    count = len(feedback.order) // width
    blocks = feedback.lower.reshape(count, width, count, width).diagonal(dim1=0, dim2=2)
    roots = feedback.pivots.sqrt().reshape(count, width, 1)
    metrics = roots * (blocks.permute(2, 0, 1) + torch.eye(width))
    return dict(zip(feedback.order[::width].tolist(), metrics, strict=True))
