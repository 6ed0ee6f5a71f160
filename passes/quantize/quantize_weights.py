"""Weights of linears and embeddings become codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

from qcompile.errors import RecipeError
from qcompile.formats import Format, Rounded, ScaleSearch, rtn
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip
from qcompile.passes.quantize.layers import LayerWeight, layer_weights
from qcompile.passes.quantize.policy import FormatPolicy, Override
from qcompile.passes.quantize.replace_weight import replace_weight

METHODS = ("rtn",)
"""How codes can be chosen."""


class QuantizeWeights(Pass):
    """Replaces float weights by stored codes, scales and zero points.

    Before::

        %1 = aten.linear(%x, @q.weight)

    After::

        %1 = qc.dequantize(@q.weight.codes, @q.weight.scale, None, 4, 64)
        %2 = aten.linear(%x, %1)

    A tensor that several layers share is quantized once, and they share its one `qc.dequantize`.
    Weights are read, rounded and released one at a time. Each leaves a record in the result's
    details: ``weight, parts, format, shape, bits_per_weight, relative_error``.

    Args:
        format: Format, or its name, of all weights that nothing below names.
        method: How codes are chosen: ``"rtn"``, round to nearest.
        scale_search: How scales are chosen: ``"absmax"`` or ``"mse"``.
        ignore: Patterns on names of weights that stay float.
        embedding: Format of the token embedding, or ``"float"``. None: that of lm_head where both
            are one tensor, else it stays float.
        lm_head: Format of the linear that makes the logits, or ``"float"``. None: `format`.
        overrides: ``{"match": pattern, "format": name or "float"}``, or objects with these
            attributes; the last match wins, over all of the above but `ignore`.

    Raises:
        RecipeError: A format or the method is unknown.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_QUANTIZED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(
        self,
        format: str | Format,
        *,
        method: str = "rtn",
        scale_search: ScaleSearch = "absmax",
        ignore: Iterable[str] = (),
        embedding: str | Format | None = None,
        lm_head: str | Format | None = None,
        overrides: Iterable[Override | Mapping[str, str]] = (),
    ) -> None:
        if method not in METHODS:
            raise RecipeError(
                f"unknown method '{method}'", remedy=f"known methods: {', '.join(METHODS)}"
            )
        self._policy = FormatPolicy.of(
            format, embedding=embedding, lm_head=lm_head, ignore=ignore, overrides=overrides
        )
        self._scale_search = scale_search

    def run(self, program: Program, context: Context) -> PassResult:
        """Quantizes every weight that the recipe gives a format.

        Raises:
            RecipeError: A tied weight is given two formats.
            ModelError: A weight is not finite, or out of its format's reach; names it.
        """
        weights, excluded = layer_weights(program)
        result = PassResult(skips=[Skip(name, reason) for name, reason in excluded.items()])
        names = [*(weight.name for weight in weights), *excluded]
        result.skips += [
            Skip(pattern, "the pattern matches no weight")
            for pattern in self._policy.unmatched(names)
        ]
        # All decisions come first, so that a contradictory recipe fails before any work.
        chosen: list[tuple[LayerWeight, Format]] = []
        for weight in weights:
            decision = self._policy.decide(weight)
            if decision.format is None:
                result.skips.append(Skip(weight.name, decision.reason))
            else:
                chosen.append((weight, decision.format))
        context.progress.stage("quantize weights", len(chosen))
        for weight, format in chosen:
            rounded = rtn(
                program.weights.materialize(weight.name),
                format,
                scale_search=self._scale_search,
                name=weight.name,
            )
            replace_weight(program, weight, rounded.weight)
            result.rewrites += 1
            result.details.append(_record(weight, rounded))
            context.progress.advance(1, weight.name)
        return result


def _record(weight: LayerWeight, rounded: Rounded) -> dict[str, object]:
    quantized = rounded.weight
    return {
        "weight": weight.name,
        "parts": sorted(part.value for part in weight.parts),
        "format": str(quantized.format),
        "shape": list(quantized.shape),
        "bits_per_weight": quantized.format.bits_per_weight(quantized.shape),
        "relative_error": rounded.relative_error,
    }
