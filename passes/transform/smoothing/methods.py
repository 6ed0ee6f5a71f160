"""How published methods turn magnitudes of channels into scales: one line of mathematics each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

_SMALLEST = 1e-5
"""Magnitudes below this count as this: a channel that is never used needs no scale."""


@dataclass(frozen=True, eq=False)
class Magnitudes:
    """What is known of the channels of one block.

    Attributes:
        largest: Of the activations, ``[n]`` float64.
        mean: Of the activations' magnitudes, ``[n]`` float64.
        weights: Largest weight that multiplies each channel, over all readers, ``[n]`` float64.
    """

    largest: Tensor
    mean: Tensor
    weights: Tensor


class ScaleRule(ABC):
    """A family of scales with one parameter.

    Attributes:
        strengths: The values of the parameter that a search tries.
    """

    strengths: ClassVar[tuple[float, ...]]

    @abstractmethod
    def scale(self, seen: Magnitudes, strength: float) -> Tensor:
        """What the channels are divided by: ``[n]`` float64, positive."""


class SmoothQuant(ScaleRule):
    """``max|x|^alpha / max|w|^(1 - alpha)``. Source: Xiao et al. 2022 (arXiv 2211.10438), eq. 4."""

    strengths = tuple(i / 20 for i in range(2, 20))

    def scale(self, seen: Magnitudes, strength: float) -> Tensor:
        """With alpha = `strength`."""
        activations, weights = (_positive(m) for m in (seen.largest, seen.weights))
        return activations**strength / weights ** (1 - strength)


class Awq(ScaleRule):
    """``mean|x|^r``, centred on 1. Source: Lin et al. 2023 (arXiv 2306.00978), section 3.2."""

    strengths = tuple(i / 20 for i in range(1, 20))

    def scale(self, seen: Magnitudes, strength: float) -> Tensor:
        """With r = `strength`."""
        scale = (_positive(seen.mean) ** strength).clamp(min=1e-4)
        return scale / (scale.max() * scale.min()).sqrt()


class OsPlus(ScaleRule):
    """``max(1, max|x| / t)``: only channels beyond a threshold shrink.

    Thresholds are tried from the largest activation down to a thousandth of it (the paper: down to
    0.1, in even steps), since one channel may be that much larger than all others.

    Source: Wei et al. 2023 (Outlier Suppression+, arXiv 2304.09145), section 4.2.
    """

    strengths = tuple(2 ** (-i / 2) for i in range(1, 21))

    def scale(self, seen: Magnitudes, strength: float) -> Tensor:
        """With t = `strength` times the largest activation of all channels."""
        threshold = strength * _positive(seen.largest).max()
        return (seen.largest / threshold).clamp(min=1)


class Preshift(ScaleRule):
    """``2^-b``, b whole: small channels are lifted towards the largest one, by powers of two.

    These are LLM-FP4's pre-shifted exponent biases of activations: b is what the channel's bias has
    over the tensor's, ``min(round(log2(max over all / max|x|)), 2^E - 1)``, and goes into the
    weights. Powers of two change no mantissa: floats before and after are the same numbers.

    Source: Liu et al. 2023 (LLM-FP4, arXiv 2310.16836), section 4.2.
    """

    strengths = tuple(2.0 ** -(2**bits - 1) for bits in (1, 2, 3))

    def scale(self, seen: Magnitudes, strength: float) -> Tensor:
        """With ``2^(1 - 2^E)``, the smallest scale, = `strength`; other strengths likewise."""
        largest = _positive(seen.largest)
        return (largest / largest.max()).clamp(min=strength).log2().round().exp2()


RULES: Mapping[str, ScaleRule] = MappingProxyType(
    {"smoothquant": SmoothQuant(), "awq": Awq(), "os+": OsPlus(), "preshift": Preshift()}
)
"""The rules by their names in recipes."""


def _positive(magnitudes: Tensor) -> Tensor:
    return magnitudes.to(torch.float64).clamp(min=_SMALLEST)
