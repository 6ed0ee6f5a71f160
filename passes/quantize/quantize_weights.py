"""Weights of linears, embeddings and routed experts become codes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from qcompile.formats import Format, QuantizedWeight, ScaleSearch, relative_error
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Lossy, Numerics, Pass, PassResult, Skip
from qcompile.passes.quantize.calibrated import Finished, Job, Sequential, quantize_calibrated
from qcompile.passes.quantize.layers import LayerWeight, Part, layer_weights
from qcompile.passes.quantize.methods import Outcome, Rtn, Task, make_method
from qcompile.passes.quantize.methods.block import BlockMethod
from qcompile.passes.quantize.policy import FormatPolicy, Override
from qcompile.passes.quantize.replace_weight import replace_weight
from qcompile.passes.quantize.stacked import quantize_stacked
from qcompile.passes.tune.quantize_blocks import block_weights, quantize_blocks

_Chosen = tuple[LayerWeight, Format]
_Made = tuple[LayerWeight, QuantizedWeight, dict[str, object]]

_CALIBRATED = frozenset({Part.LINEAR, Part.LM_HEAD, Part.EXPERTS})
"""What layers do that calibration data can say something about."""


class QuantizeWeights(Pass):
    """Replaces float weights by stored codes, scales and zero points.

    Before::

        %1 = aten.linear(%x, @q.weight)

    After::

        %1 = qc.dequantize(@q.weight.codes, @q.weight.scale, None, 4, 64)
        %2 = aten.linear(%x, %1)

    A tensor that several layers share is quantized once, and they share its one `qc.dequantize`.
    Each weight leaves a record in the result's details: ``weight, parts, method, format, shape,
    bits_per_weight, relative_error``, and where calibration data was used ``output_error``.

    Methods that look at the inputs of layers run the program on the context's calibration data,
    stage by stage. Weights that are (also) embeddings have no such inputs and are rounded to
    nearest.

    Args:
        format: Format, or its name, of all weights that nothing below names.
        method: How codes are chosen, a key of `qcompile.passes.quantize.methods.METHODS`.
        options: Options of the method.
        scale_search: How scales are chosen: ``"absmax"``, ``"mse"`` or ``"l2.4"``.
        sequential: For methods that look at inputs, whose quantized weights these have gone
            through: those of all layers before (``"layer"``), of all decoder blocks before
            (``"block"``), or of none (``"none"``). Methods that learn blocks as a whole take
            ``"layer"`` for ``"block"``.
        rounds: How often such methods go through the program. From the second time on inputs have
            gone through the quantized weights of the round before wherever `sequential` leaves
            float ones. Methods that learn blocks go through it once.
        ignore: Patterns on names of weights that stay float.
        embedding: Format of the token embedding, or ``"float"``. None: that of lm_head where both
            are one tensor, else it stays float.
        lm_head: Format of the linear that makes the logits, or ``"float"``. None: `format`.
        overrides: ``{"match": pattern, "format": name or "float"}``, or objects with these
            attributes; the last match wins, over all of the above but `ignore`.

    Raises:
        RecipeError: A format, the method or one of its options is unknown.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_QUANTIZED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(
        self,
        format: str | Format,
        *,
        method: str = "rtn",
        options: Mapping[str, Any] | None = None,
        scale_search: ScaleSearch = "absmax",
        sequential: Sequential = "layer",
        rounds: int = 1,
        ignore: Iterable[str] = (),
        embedding: str | Format | None = None,
        lm_head: str | Format | None = None,
        overrides: Iterable[Override | Mapping[str, str]] = (),
    ) -> None:
        self._method_name = method
        self._method = make_method(method, options)
        self._sequential: Sequential = sequential
        self._rounds = rounds
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
        calibrated: set[str] = set()
        if self._method.needs_data:
            calibrated = {weight.name for weight, _ in chosen if weight.parts <= _CALIBRATED}
        if isinstance(self._method, BlockMethod):
            calibrated &= block_weights(program)
        made = [
            *self._by_weight(program, [c for c in chosen if c[0].name not in calibrated], context),
            *self._by_inputs(program, [c for c in chosen if c[0].name in calibrated], context),
        ]
        records = {weight.name: record for weight, _, record in made}
        for weight, quantized, _ in made:
            replace_weight(program, weight, quantized)
        result.rewrites = len(made)
        result.details += [records[weight.name] for weight, _ in chosen]
        return result

    def _by_weight(
        self, program: Program, chosen: Sequence[_Chosen], context: Context
    ) -> Iterator[_Made]:
        """Quantizes weights by their numbers alone, one at a time."""
        name, method = self._method_name, self._method
        if method.needs_data:
            name, method = "rtn", Rtn()
        context.progress.stage("quantize weights", len(chosen))
        for weight, format in chosen:
            float_weight = program.weights.materialize(weight.name)
            task = Task(weight.name, float_weight, format, self._scale_search)
            outcome = quantize_stacked(method, task)
            context.progress.advance(1, weight.name)
            error = relative_error(float_weight, outcome.weight)
            yield weight, outcome.weight, _record(weight, name, outcome, error)

    def _by_inputs(
        self, program: Program, chosen: Sequence[_Chosen], context: Context
    ) -> Iterator[_Made]:
        """Quantizes weights by what they do to calibration data."""
        if not chosen:
            return
        by_name = {weight.name: weight for weight, _ in chosen}
        for finished in self._finished(program, chosen, context):
            weight, outcome = by_name[finished.job.name], finished.outcome
            record = _record(weight, self._method_name, outcome, finished.relative_error)
            yield weight, outcome.weight, {**record, "output_error": finished.output_error}

    def _finished(
        self, program: Program, chosen: Sequence[_Chosen], context: Context
    ) -> Iterator[Finished]:
        method, calibration, progress = self._method, context.calibration, context.progress
        jobs = [Job(w.name, format, self._scale_search, method) for w, format in chosen]
        name, sequential = self._method_name, self._sequential
        if isinstance(method, BlockMethod):
            return quantize_blocks(
                program,
                jobs,
                method,
                calibration,
                name=name,
                sequential=sequential,
                seed=context.seed,
                progress=progress,
            )
        return quantize_calibrated(
            program,
            jobs,
            calibration,
            method=name,
            sequential=sequential,
            progress=progress,
            rounds=self._rounds,
        )


def _record(weight: LayerWeight, method: str, outcome: Outcome, error: float) -> dict[str, object]:
    quantized = outcome.weight
    notes = {"notes": list(outcome.notes)} if outcome.notes else {}
    return {
        "weight": weight.name,
        "parts": sorted(part.value for part in weight.parts),
        "method": method,
        "format": str(quantized.format),
        "shape": list(quantized.shape),
        "bits_per_weight": quantized.format.bits_per_weight(quantized.shape),
        "relative_error": error,
        **notes,
    }
