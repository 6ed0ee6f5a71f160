"""What a choice of scales costs: the error of the layers that read them, all rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.formats import Format
from qcompile.passes.quantize.activation_formats import ActivationFormat
from qcompile.passes.transform.smoothing.scale_sites import Reader, ScaleSite
from qcompile.passes.transform.values import Transform


@dataclass(frozen=True)
class Rounding:
    """The rounding that scales are chosen for.

    Attributes:
        weights: Format of the weights.
        activations: Format of the activations; None leaves them as they are.
        per_tensor: Whether activations share one scale, that of the largest value that calibration
            saw, in place of one per token.
    """

    weights: Format
    activations: ActivationFormat | None = None
    per_tensor: bool = False


@dataclass(frozen=True, eq=False)
class ReaderSamples:
    """What an objective knows of one reader.

    Attributes:
        reader: The reader.
        weight: Some of its outputs, ``[N, K]`` float32.
        rows: Some inputs, the largest among them, ``[T, K]`` float32.
        largest: Magnitude of each input channel over all calibration data, ``[K]``.
        rotation: What will stand between the scales and the rounding, if anything will.
    """

    reader: Reader
    weight: Tensor
    rows: Tensor
    largest: Tensor
    rotation: Transform | None = None


@dataclass(frozen=True, eq=False)
class Rounded:
    """A reader's operands with channels scaled, before and after rounding.

    Attributes:
        weight: ``[N, K]``.
        rounded_weight: ``[N, K]``.
        rows: ``[T, K]``.
        rounded_rows: ``[T, K]``.
    """

    weight: Tensor
    rounded_weight: Tensor
    rows: Tensor
    rounded_rows: Tensor


class Objective:
    """The error of a site's readers as a function of its scales.

    It is the mean over inputs of the squared error of a reader's output over that output's own
    energy, summed over readers: what a normalization behind it leaves of an error depends on the
    size of its token, and a few tokens are thousands of times as large as others. Outputs smaller
    than the median count as if they were of median size. (The paper of AWQ compares outputs of
    whole modules; the outputs of the linears themselves are what later methods minimize, and need
    no module boundaries.)

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
            self.error(output, self._rounded(sample, self._site.spread(sample.reader, scales)))
            for sample, output in zip(self._samples, self._outputs, strict=True)
        )

    def error(self, output: Tensor, found: Rounded) -> float:
        """The error of one reader.

        Args:
            output: As it should be, ``[T, N]``.
            found: Its operands.
        """
        errors = found.rounded_rows @ found.rounded_weight.T - output
        return float((errors.square().sum(1) / row_energies(output)).mean())

    def _rounded(self, sample: ReaderSamples, scale: Tensor) -> Rounded:
        scale = scale.to(torch.float32)
        weight, rows = sample.weight * scale, sample.rows / scale
        largest = float((sample.largest / scale).max())
        if sample.rotation is not None:
            weight, rows = sample.rotation.apply(weight), sample.rotation.apply(rows)
            largest = float(rows.abs().max())
        format = self._rounding.weights
        rounded_weight = format.decode(format.encode(weight, name=sample.reader.weight))
        return Rounded(weight, rounded_weight, rows, self._round(rows, largest))

    def _round(self, rows: Tensor, largest: float) -> Tensor:
        format = self._rounding.activations
        if format is None:
            return rows
        if not self._rounding.per_tensor:
            return format.round(rows, format.covering(rows, 0))
        limit = torch.tensor([max(largest, _TINY)])
        return format.round(rows, format.grid(-limit, limit))


def row_energies(output: Tensor) -> Tensor:
    """The squared size of each output ``[T, N]``, at least their median: ``[T]``, positive."""
    energies = output.square().sum(1)
    return energies.clamp(min=max(float(energies.median()), _TINY))


_TINY = 1e-30
