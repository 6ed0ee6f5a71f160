"""Round-to-nearest: the algorithm that looks at nothing but the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats.base import Format, QuantizedWeight, ScaleSearch

_BLOCK_ELEMENTS = 1 << 18  # decoded at a time


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
    difference = total = 0.0
    step = max(1, _BLOCK_ELEMENTS * weight.shape[0] // max(1, weight.numel()))
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        exact = weight[start:stop].to(torch.float64)
        decoded = quantized.format.decode(quantized.format.rows(quantized, start, stop))
        difference += float((decoded - exact).square().sum())
        total += float(exact.square().sum())
    return math.sqrt(difference / total) if total else 0.0
