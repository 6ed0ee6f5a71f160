"""Before any work: can the target run what the recipe makes of the model, and what will it take?

`preflight` answers from shapes alone. It names *every* layer that stands in the way, with what to
do about it, and predicts the artifact's size (exactly, where the target can tell) and, roughly,
the memory and the time that the compilation takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qcompile.backends.base import Capabilities, Finding, Target
from qcompile.backends.registry import get_target
from qcompile.errors import QCompileError, RecipeError, TargetError
from qcompile.estimates import Estimate, estimate
from qcompile.folding import fold_names
from qcompile.formats import (
    Format,
    IntegerFormat,
    IntegerScaleFormat,
    LookupFormat,
    ScalarFormat,
    SparseFormat,
    SplitFormat,
    VectorFormat,
)
from qcompile.formats.dense import DenseFormat
from qcompile.ir.program import Program
from qcompile.kernels.kv_append.rows import FLOAT_CACHE
from qcompile.kernels.lookup.levels import code_bits
from qcompile.passes.infra import Context, PassRecord
from qcompile.passes.quantize.bits import BitsReport, count_bits
from qcompile.passes.quantize.layers import Part
from qcompile.passes.quantize.quantize_activations import QuantizeActivations as RoundActivations
from qcompile.pipeline import make_pass
from qcompile.planning import PlannedWeight, WeightPlan, plan, plan_transforms, plan_weights
from qcompile.recipe import (
    DEFAULT_RECIPE,
    QuantizeActivations,
    QuantizeCache,
    QuantizeWeights,
    Recipe,
    load_recipe,
)

SCHEMA_VERSION = 1
"""Of `Preflight.to_dict`."""

_EMBEDDINGS = frozenset({Part.TOKEN_EMBEDDING.value, Part.OTHER_EMBEDDING.value})
_LINEARS = frozenset({Part.LINEAR.value, Part.LM_HEAD.value})


@dataclass(frozen=True)
class LayerVerdict:
    """One weight of the model and what becomes of it.

    Attributes:
        name: The weight.
        parts: What it does: ``linear``, ``lm_head``, ``embedding``, ``other embedding``; empty
            for weights that cannot become codes.
        shape: Its shape.
        format: Name of the format that the recipe gives it, or ``"float32"`` and the like.
        reason: Why it stays float; empty for one that becomes codes.
        activations: Name of the format that its inputs are rounded to, or ``"float"``.
        bits_per_weight: Stored bits, those of scales and zero points included.
        legal: Whether the target can run it so.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    format: str
    reason: str
    activations: str
    bits_per_weight: float
    legal: bool


@dataclass(frozen=True)
class Preflight:
    """The verdict on a model, a recipe and a target.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        target: Name of the target.
        layers: Every weight of two and more dimensions, in graph order.
        findings: What stands in the way; empty if the compilation is legal.
        warnings: What is legal and perhaps not meant: patterns without a match, groups wider
            than a layer.
        notes: What a user may want to know, such as why a region is a barrier.
        estimate: What the compilation takes and gives; None if it is not legal.
    """

    model: str
    recipe: str
    target: str
    layers: tuple[LayerVerdict, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    estimate: Estimate | None

    @property
    def legal(self) -> bool:
        """Whether nothing stands in the way."""
        return not self.findings

    def refuse(self) -> None:
        """Raises what `compile` would.

        Raises:
            TargetError: Names all layers that stand in the way; none if the verdict is legal.
        """
        if self.findings:
            listed = "\n".join(f"  - {finding}" for finding in _fold_findings(self.findings))
            raise TargetError(
                f"target '{self.target}' cannot run '{self.model}' with recipe '{self.recipe}':\n"
                f"{listed}",
                remedy="'qcompile check' shows what becomes of every layer",
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; its keys stay as they are within a `SCHEMA_VERSION`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "recipe": self.recipe,
            "target": self.target,
            "legal": self.legal,
            "findings": [
                {"layer": f.layer, "reason": f.reason, "remedy": f.remedy} for f in self.findings
            ],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
        }


def preflight(
    program: Program, recipe: str | Recipe = DEFAULT_RECIPE, target: str | Target = "cpu"
) -> Preflight:
    """Judges a compilation without computing anything: no weight is read.

    Args:
        program: A captured program, as `qcompile.capture` returns it; it is not changed.
        recipe: A recipe, or anything that names one.
        target: A target or its name.

    Raises:
        RecipeError: There is no such recipe or target.
    """
    recipe = load_recipe(recipe)
    backend = get_target(target) if isinstance(target, str) else target
    transformed, others = plan_transforms(program, recipe)
    weights = plan_weights(transformed, others)
    findings = [
        *_weight_findings(weights, backend.capabilities),
        *_activation_findings(weights, recipe, backend),
        *_cache_findings(recipe, backend),
    ]
    planned, records = _plan(transformed, others, findings)
    lowered = None if findings else _lower(planned, backend, findings)
    findings += backend.check(program if lowered is None else lowered)
    bits = count_bits(planned)
    predicted = None
    if lowered is not None and not findings:
        files = backend.predict_files(lowered)
        predicted = estimate(program, planned, recipe, bits=bits, files=files)
    return Preflight(
        program.provenance.name,
        recipe.name,
        backend.name,
        tuple(_verdicts(weights, bits, records, findings)),
        tuple(findings),
        tuple(_warnings(weights, recipe)),
        tuple(_notes(program, recipe)),
        predicted,
    )


# --- What stands in the way ------------------------------------------------------------------


def _weight_findings(weights: WeightPlan, capabilities: Capabilities) -> Iterator[Finding]:
    """Layers whose formats contradict each other, or that the target cannot run."""
    for weight in weights.weights:
        if weight.conflict is not None:
            yield Finding(weight.name, weight.conflict.message, weight.conflict.remedy)
        elif weight.format is not None:
            for format in weight.alternatives or (weight.format,):
                reason = _refusal(weight, format, capabilities)
                if reason is not None:
                    other = _other_format(replace(weight, format=format), capabilities)
                    yield Finding(weight.name, reason, other)


def _refusal(weight: PlannedWeight, format: Format, capabilities: Capabilities) -> str | None:
    """Why a weight cannot be stored in a format, or None."""
    if 0 in weight.shape:
        return f"a weight of shape {list(weight.shape)} has nothing to quantize"
    try:
        format.tensors(weight.shape)
    except QCompileError as error:
        return error.message
    reason = None
    if isinstance(format, SplitFormat | SparseFormat):
        reason = _part_refusal(weight, format, capabilities)
    elif not _EMBEDDINGS.issuperset(weight.parts):
        reason = capabilities.weight_format(format)
    if reason is None and not _EMBEDDINGS.isdisjoint(weight.parts):
        reason = capabilities.embedding_format(format)
    return None if reason is None else f"{format}: {reason}"


def _part_refusal(
    weight: PlannedWeight, format: SplitFormat | SparseFormat, capabilities: Capabilities
) -> str | None:
    """Why a weight cannot be stored in parts of several formats; a float part needs no kernel."""
    if not _LINEARS.issuperset(weight.parts):
        return "only weights of linear layers are taken apart"
    if isinstance(format, SparseFormat):
        if not capabilities.sparse_floats:
            return "the target has no kernel for floats beside codes"
        return _refusal(weight, format.base, capabilities)
    coded = [part for part in format.formats if not isinstance(part, DenseFormat)]
    return next(filter(None, map(capabilities.weight_format, coded)), None)


def _other_format(weight: PlannedWeight, capabilities: Capabilities) -> str:
    """The remedy: the nearest format that the layer can take, or none at all."""
    wanted = weight.format
    if wanted is not None and 0 not in weight.shape:
        for candidate in _near(wanted):
            if _refusal(weight, candidate, capabilities) is None:
                return f"use {candidate}, or leave it float"
    return "leave it float: 'ignore' it in quantize_weights"


def _near(format: Format) -> Iterator[Format]:
    """Formats like one, the nearest first: rather more bits than fewer, rather the same groups."""
    while isinstance(format, SplitFormat | SparseFormat):
        format = format.base
        yield format
    if isinstance(format, VectorFormat):
        format = IntegerFormat(-(-format.code_bits // format.dimension), format.group_size)
    if isinstance(format, LookupFormat):
        yield from (replace(format, group_size=size) for size in _near_groups(format.group_size))
        width = code_bits(format.table)
        format = IntegerFormat(max(width, 2), format.group_size)
    if isinstance(format, IntegerScaleFormat):
        format = replace(format.base, scale_dtype=IntegerFormat(8).scale_dtype)
    if isinstance(format, IntegerFormat):
        scales = dict.fromkeys((format.scale_dtype, IntegerFormat(8).scale_dtype))
        for bits in (*range(format.bits, 9), *range(format.bits - 1, 0, -1)):
            for group_size in _near_groups(format.group_size):
                for scale in scales:
                    yield replace(format, bits=bits, group_size=group_size, scale_dtype=scale)


def _near_groups(group_size: int) -> list[int]:
    return list(dict.fromkeys((group_size, -(-group_size // 16) * 16, 64, 0)))


def _activation_findings(weights: WeightPlan, recipe: Recipe, target: Target) -> Iterator[Finding]:
    """Layers whose inputs would be rounded to a format that the target does not have."""
    known = target.capabilities.activation_formats
    for step in recipe.steps:
        if not isinstance(step.options, QuantizeActivations):
            continue
        rounding = make_pass(step.name, step.options)
        assert isinstance(rounding, RoundActivations)
        for weight in weights.weights:
            format = rounding.format_of(weight.name)
            reads = weight.format is not None and not _EMBEDDINGS.issuperset(weight.parts)
            if reads and format is not None and str(format) not in known:
                reason = f"the {target.name} target has no {format} activations"
                yield Finding(weight.name, reason, _other_activations(str(format), known))


def _other_activations(wanted: str, known: frozenset[str]) -> str:
    """A remedy: formats of the same kind, or else the others."""
    integers = {name for name in known if name.startswith("int")}
    alike = (integers if wanted.startswith("int") else known - integers) or known
    return f"use {' or '.join(sorted(alike))}" if alike else "leave the step out"


def _cache_findings(recipe: Recipe, target: Target) -> Iterator[Finding]:
    """Cache formats that the target does not have."""
    known = target.capabilities.cache_formats
    for step in recipe.steps:
        if not isinstance(step.options, QuantizeCache):
            continue
        options = step.options
        for side in ("keys", "values"):
            format = getattr(options, side) or options.format
            if format != FLOAT_CACHE and format not in known:
                reason = f"the {target.name} target has no {format} cache"
                instead = f"use {' or '.join(sorted(known))}" if known else "leave the step out"
                yield Finding(f"the cache of {side}", reason, instead)


def _plan(
    program: Program, recipe: Recipe, findings: list[Finding]
) -> tuple[Program, list[PassRecord]]:
    """The planned program; the program itself where the recipe contradicts itself."""
    try:
        return plan(program, recipe)
    except RecipeError as error:
        if not findings:
            findings.append(Finding(program.provenance.name, error.message, error.remedy))
        return program, []


def _lower(planned: Program, target: Target, findings: list[Finding]) -> Program | None:
    """The planned program as the target runs it; what it refuses joins the findings."""
    try:
        return target.lower(planned, Context())
    except TargetError as error:
        findings.append(Finding(planned.provenance.name, error.message, error.remedy))
        return None


def _fold_findings(findings: tuple[Finding, ...]) -> list[Finding]:
    """Findings of the same reason and remedy as one, with the layers' names folded."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for finding in findings:
        groups.setdefault((finding.reason, finding.remedy), []).append(finding.layer)
    return [
        Finding(", ".join(fold_names(layers)), reason, remedy)
        for (reason, remedy), layers in groups.items()
    ]


# --- What a user may want to know ------------------------------------------------------------


def _warnings(weights: WeightPlan, recipe: Recipe) -> Iterator[str]:
    for pattern in weights.unmatched:
        yield f"the pattern '{pattern}' of quantize_weights matches no weight"
    wide = [
        weight.name
        for weight in weights.weights
        if isinstance(weight.format, ScalarFormat) and weight.format.group_size > weight.shape[-1]
    ]
    for layers in fold_names(wide):
        yield f"{layers} is narrower than its group: it has one group per row"
    quantizes = any(step.name == "quantize_weights" for step in recipe.steps)
    if quantizes and not any(weight.format for weight in weights.weights):
        yield "the recipe quantizes no weight of this model"


def _notes(program: Program, recipe: Recipe) -> Iterator[str]:
    yield from program.notes
    if any(isinstance(o := s.options, QuantizeWeights) and o.has_budget for s in recipe.steps):
        yield (
            "formats are chosen for a budget, by sensitivities that are measured when the model is "
            "compiled: those shown come as near to it as if all layers were alike"
        )
    if not program.signature.is_causal_lm:
        yield "the model keeps no cache: it runs, but 'qcompile run' cannot generate text with it"


def _verdicts(
    weights: WeightPlan, bits: BitsReport, records: list[PassRecord], findings: list[Finding]
) -> Iterator[LayerVerdict]:
    refused = {finding.layer for finding in findings}
    stored = {tensor.name: tensor for tensor in bits.tensors}
    rounded = {
        name: str(detail.get("choice", detail["format"]))
        for record in records
        if record.name in ("quantize_activations", "quantize_clusters")
        for detail in record.result.details
        for name in detail["weights"]
    }
    for weight in weights.weights:
        tensor = stored[weight.name]
        yield LayerVerdict(
            weight.name,
            weight.parts,
            weight.shape,
            tensor.format if weight.format is None else str(weight.format),
            weight.reason,
            rounded.get(weight.name, "float"),
            tensor.bits_per_weight,
            weight.name not in refused,
        )


def _layer_to_dict(layer: LayerVerdict) -> dict[str, Any]:
    return {
        "name": layer.name,
        "parts": list(layer.parts),
        "shape": list(layer.shape),
        "format": layer.format,
        "reason": layer.reason,
        "activations": layer.activations,
        "bits_per_weight": layer.bits_per_weight,
        "legal": layer.legal,
    }
