"""Scales that bound the error of weights and activations rounded together: ATQ."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from qcompile.formats import Format
from qcompile.passes.transform.smooth import Smooth
from qcompile.passes.transform.smoothing.objective import Objective, Rounded, row_energies


class TriangleBound(Objective):
    """The sum of a layer's two rounding errors, each relative as `Objective` measures errors.

    With weights W rounded to Q and inputs X to Y, the error of the layer is bounded by
    ``|X W^T - Y Q^T| <= |X (W - Q)^T| + |(X - Y) Q^T|``: what a quantizer of weights makes small,
    and what is left to the scales. Unlike the error itself, the bound does not profit from errors
    that happen to cancel on the samples.
    """

    def error(self, output: Tensor, found: Rounded) -> float:
        """The bound for one reader; see `Objective.error`."""
        of_weight = found.rows @ (found.weight - found.rounded_weight).T
        of_rows = (found.rows - found.rounded_rows) @ found.rounded_weight.T
        energies = row_energies(output)
        means = [float((e.square().sum(1) / energies).mean()) for e in (of_weight, of_rows)]
        return sum(math.sqrt(mean) for mean in means)


class Atq(Smooth):
    """Divides channels by scales and multiplies the weights that read them, as `Smooth` does.

    The scales are SmoothQuant's, ``max|x|^a / max|w|^(1-a)``; the strength of each site is the one
    with the least `TriangleBound`. Weights are to be quantized with compensation behind it
    (``gptq``), whose statistics then are those of the scaled inputs.

    Args:
        weights: The format that the search rounds weights to.
        activations: ``"int8"`` and the like: what it rounds activations to, per token.
        ignore: Patterns on names of weights; a site that one of them reads stays as it is.

    Raises:
        RecipeError: A format is unknown.

    Source: ATQ (Findings of EMNLP 2024, 1001): the inequality and the order of steps. Its rule for
    scales could not be verified, so that SmoothQuant's is searched in its place.
    """

    objective = TriangleBound

    def __init__(
        self,
        weights: str | Format = "int8",
        activations: str = "int8",
        ignore: Iterable[str] = (),
    ) -> None:
        super().__init__(weights=weights, activations=activations, ignore=ignore)
