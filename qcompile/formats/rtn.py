"""Round-to-nearest: the algorithm that looks at nothing but the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats.base import Format, QuantizedWeight
from qcompile.formats.grid import ScaleSearch
from qcompile.formats.row_blocks import map_row_blocks


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded weight and how far it is from the original.

    Attributes:
        weight: The tensors that stand for it.
        relative_error: ||w - decoded|| / ||w||, Frobenius; 0 for a weight of zeros.
    """

    weight: QuantizedWeight
    relative_error: float


def rtn(
    weight: Tensor,
    format: Format,
    *,
    scale_search: ScaleSearch = "absmax",
    name: str = "weight",
) -> Rounded:
    """Rounds a weight to the nearest values of a format.

    Args:
        weight: [..., K], any float dtype.
        format: What to store.
        scale_search: How scales are chosen.
        name: What error messages call the weight.

    Raises:
        ModelError: The weight is not finite, or the format cannot reach its values.
    """
    quantized = format.encode(weight, scale_search=scale_search, name=name)
    return Rounded(quantized, relative_error(weight, quantized))


def relative_error(weight: Tensor, quantized: QuantizedWeight) -> float:
    """||w - decoded|| / ||w|| over all elements, accumulated in float64; 0 for zeros.

    Args:
        weight: The original, of shape `quantized.shape`.
        quantized: What stands for it; decoded a block of rows at a time.
    """

    def squares(start: int, stop: int) -> tuple[float, float]:
        exact = weight[start:stop].to(torch.float64)
        decoded = quantized.format.decode(quantized.format.rows(quantized, start, stop))
        return float((decoded - exact).square().sum()), float(exact.square().sum())

    blocks = map_row_blocks(squares, weight.shape[0], math.prod(weight.shape[1:]))
    total = math.fsum(norm for _, norm in blocks)
    return math.sqrt(math.fsum(error for error, _ in blocks) / total) if total else 0.0
