"""What a choice of scales costs: the error of the layers that read them, all rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats import Format
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.reference import dynamic_scale, quantize
from qcompile.passes.transform.smoothing.scale_sites import Reader, ScaleSite


@dataclass(frozen=True)
class Rounding:
    """The rounding that scales are chosen for.

    Attributes:
        weights: Format of the weights.
        activation_bits: Width of the activations' codes; None leaves them as they are.
        per_tensor: Whether activations share one scale, that of the largest value that calibration
            saw, in place of one per token.
    """

    weights: Format
    activation_bits: int | None = None
    per_tensor: bool = False


@dataclass(frozen=True, eq=False)
class ReaderSamples:
    """What an objective knows of one reader.

    Attributes:
        reader: The reader.
        weight: ``[N, K]`` float32.
        rows: Some inputs, ``[T, K]`` float32.
        largest: Magnitude of each input channel over all calibration data, ``[K]``.
    """

    reader: Reader
    weight: Tensor
    rows: Tensor
    largest: Tensor


class Objective:
    """The error of a site's readers as a function of its scales.

    It is the squared error of each reader's output over that output's energy, summed. (The paper of
    AWQ compares outputs of whole modules; the outputs of the linears themselves are what later
    methods minimize, and need no module boundaries.)

    Args:
        site: The site.
        samples: What is known of its readers.
        rounding: What becomes of weights and activations.
    """

    def __init__(
        self, site: ScaleSite, samples: Sequence[ReaderSamples], rounding: Rounding
    ) -> None:
        self._site = site
        self._samples = samples
        self._rounding = rounding
        self._outputs = [sample.rows @ sample.weight.T for sample in samples]

    def __call__(self, scales: Sequence[Tensor]) -> float:
        """The error with channels divided by scales, ``[size]`` per block."""
        return sum(
            self._error(sample, output, self._site.spread(sample.reader, scales).float())
            for sample, output in zip(self._samples, self._outputs, strict=True)
        )

    def _error(self, sample: ReaderSamples, output: Tensor, scale: Tensor) -> float:
        format = self._rounding.weights
        weight = format.decode(format.encode(sample.weight * scale, name=sample.reader.weight))
        rows = self._rounded(sample.rows / scale, float((sample.largest / scale).max()))
        energy = float(output.square().sum())
        return float((rows @ weight.T - output).square().sum()) / max(energy, _TINY)

    def _rounded(self, rows: Tensor, largest: float) -> Tensor:
        bits = self._rounding.activation_bits
        if bits is None:
            return rows
        step = max(largest, _TINY) / (2 ** (bits - 1) - 1)
        scale = torch.tensor([step]) if self._rounding.per_tensor else dynamic_scale(rows, bits, 0)
        return dequantize(quantize(rows, scale, None, bits, 0), scale, None, bits, 0)


_TINY = 1e-30
