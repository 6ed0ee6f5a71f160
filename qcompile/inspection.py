"""What stands in a model, and what a recipe and a target make of it, without reading weights.

`inspect` follows a model through the phases of a compilation and keeps what people ask about:
operators by phase, memory and operations by stage, what was not recognized and why, and on request
the program's text after a phase. Steps that quantize are planned, not run: the programs are the
same, node for node.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qcompile.analysis.cost import Cost, CostModel, Sizes, size_names
from qcompile.analysis.stages import Stage, stages
from qcompile.artifact_inspection import ArtifactInspection
from qcompile.backends.registry import get_target
from qcompile.compiler import Model, open_model
from qcompile.errors import QCompileError, RecipeError, TargetError, suggest
from qcompile.folding import fold_names, fold_numbers
from qcompile.inspection_records import (
    Barrier,
    Inspection,
    PhaseSummary,
    PortSummary,
    SiteSummary,
    StageSummary,
)
from qcompile.inspection_sites import summarize_sites
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Port
from qcompile.manifest import is_artifact
from qcompile.passes.infra import Context, PassManager, PassRecord
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import front_phases
from qcompile.planning import plan
from qcompile.recipe import Recipe, load_recipe

PREFILL = Sizes(batch=1, query=512, past=0)
DECODE = Sizes(batch=1, query=1, past=512)

ALL_PHASES = "all"
"""In place of a phase's name: every phase."""


def inspect(
    model: Model,
    recipe: str | Path | Mapping[str, object] | Recipe | None = None,
    target: str = "cpu",
    *,
    workloads: Mapping[str, Sizes] | None = None,
    texts: Collection[str] = (),
    example_inputs: Any = None,
    overrides: Mapping[str, object] | None = None,
    dequantize: bool = False,
    sites: bool = False,
) -> Inspection | ArtifactInspection:
    """Looks into a model without reading its weights, or into an artifact.

    Args:
        model: As for `qcompile.compile`, or the directory of an artifact.
        recipe: What to follow the model through; None stops at the raised program.
        target: What to lower it to after the recipe.
        workloads: Sizes to give costs for, by name; by default prefill of 512 tokens and decoding
            of one after them.
        texts: Names of the phases to keep the program's text of; ``"all"`` is all of them.
        example_inputs: For a plain module, inputs to trace it with.
        overrides: Options to set on top of the recipe.
        dequantize: Whether an already quantized checkpoint may be read as floats.
        sites: Whether to look for sites of equivalent transforms.

    Raises:
        QCompileError: The model cannot be read, or there is no such recipe, target or phase.
    """
    if isinstance(model, (str, os.PathLike)) and is_artifact(Path(model)):
        return ArtifactInspection.read(Path(model))
    resolved = None if recipe is None else load_recipe(recipe, overrides)
    backend = None if resolved is None else get_target(target)
    recorder = _Recorder(_checked_phases(texts, resolved))
    program = open_model(model, example_inputs, dequantize)
    recorder("capture", program)
    raised, records = PassManager(front_phases(), on_phase=recorder).run(program)
    notes = list(raised.notes)
    planned, refused = raised, []
    if resolved is not None and backend is not None:
        try:
            planned, _ = plan(raised, resolved, on_phase=recorder)
            lowered = backend.lower(planned, Context())
            recorder("lower", lowered)
            refused = backend.check(lowered)
        except (RecipeError, TargetError) as error:
            notes.append(_one_line(error))
    return _summarize(
        raised,
        planned,
        workloads=workloads or default_workloads(raised),
        phases=tuple(recorder.phases),
        passed_over=[*_skips(records), *((f.layer, f.reason) for f in refused)],
        notes=tuple(notes),
        recipe=None if resolved is None else resolved.name,
        target=None if backend is None else backend.name,
        sites=summarize_sites(raised) if sites else None,
    )


def phase_names(recipe: Recipe | None) -> tuple[str, ...]:
    """The phases that `inspect` sees, in order."""
    front = ("capture", *(phase.name for phase in front_phases()))
    return front if recipe is None else (*front, *(step.name for step in recipe.steps), "lower")


def default_workloads(program: Program) -> dict[str, Sizes]:
    """Prefill and decoding where there is a cache, else one pass over 512 positions."""
    if program.signature.is_causal_lm:
        return {"prefill": PREFILL, "decode": DECODE}
    return {"forward": PREFILL}


def _checked_phases(names: Collection[str], recipe: Recipe | None) -> frozenset[str]:
    known = phase_names(recipe)
    for name in names:
        if name not in known and name != ALL_PHASES:
            hint = suggest(name, (*known, ALL_PHASES))
            more = "" if recipe is not None else "; steps of a recipe need a recipe"
            raise RecipeError(f"there is no phase '{name}'", remedy=hint + more)
    return frozenset(known if ALL_PHASES in names else names)


class _Recorder:
    """Keeps what `inspect` tells of each phase."""

    def __init__(self, texts: frozenset[str]) -> None:
        self.phases: list[PhaseSummary] = []
        self._texts = texts

    def __call__(self, name: str, program: Program) -> None:
        text = program.text() if name in self._texts else None
        operators = _count_operators(program.calls())
        self.phases.append(PhaseSummary(name, len(program.graph.nodes), operators, text))


def _summarize(
    raised: Program,
    planned: Program,
    *,
    workloads: Mapping[str, Sizes],
    phases: tuple[PhaseSummary, ...],
    passed_over: Sequence[tuple[str, str]],
    notes: tuple[str, ...],
    recipe: str | None,
    target: str | None,
    sites: tuple[SiteSummary, ...] | None,
) -> Inspection:
    found = stages(raised)
    models = {name: CostModel(raised, sizes) for name, sizes in workloads.items()}
    stored = {t.name: (t.weights, -(-t.bits // 8)) for t in count_bits(planned).tensors}
    provenance = raised.provenance
    folded = _fold_stages(found, models, stored)
    return Inspection(
        model=provenance.name,
        architecture=provenance.architecture,
        source=provenance.source,
        parameters=sum(weights for weights, _ in stored.values()),
        checkpoint_bytes=provenance.stored_bytes,
        blocks=sum(stage.block is not None for stage in found),
        recipe=recipe,
        target=target,
        inputs=_ports(raised, raised.signature.inputs, raised.inputs),
        outputs=_ports(raised, raised.signature.outputs, raised.results),
        workloads=dict(workloads),
        totals={name: model.total(raised) for name, model in models.items()},
        weight_bytes=sum(size for _, size in stored.values()),
        phases=phases,
        stages=folded,
        barriers=tuple(_barriers(raised, found, folded, passed_over)),
        notes=notes,
        sites=sites,
    )


def _count_operators(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """Calls by operator; reckoning with sizes counts as one operator."""
    return dict(sorted(Counter(map(_operator, nodes)).items()))


def _operator(node: fx.Node) -> str:
    name = format_target(node.target)
    is_size = name == "aten.sym_size" or isinstance(node.meta.get("val"), (int, torch.SymInt))
    return "sizes" if is_size else name


def _ports(
    program: Program, ports: Sequence[Port], nodes: Sequence[fx.Node]
) -> tuple[PortSummary, ...]:
    names = {symbol: sympy.Symbol(name) for symbol, name in size_names(program).items()}

    def size(value: int | torch.SymInt) -> int | str:
        return value if isinstance(value, int) else str(value.node.expr.subs(names))

    summaries = []
    for port, node in zip(ports, nodes, strict=True):
        value = node.meta["val"]
        assert isinstance(value, Tensor)
        dtype = str(value.dtype).removeprefix("torch.")
        shape = tuple(map(size, value.shape))
        summaries.append(PortSummary(port.name, port.role.value, dtype, shape))
    return tuple(summaries)


# --- Stages ----------------------------------------------------------------------------------


def _fold_stages(
    found: Sequence[Stage],
    models: Mapping[str, CostModel],
    stored: Mapping[str, tuple[int, int]],
) -> tuple[StageSummary, ...]:
    """Stages of the same operators, weights and operations as one."""
    groups: dict[object, list[tuple[Stage, StageSummary]]] = {}
    counted: set[str] = set()
    for stage in found:
        own = [name for name in stage.weights if name not in counted and name in stored]
        counted.update(own)
        calls = [node for node in stage.nodes if node.op == "call_function"]
        summary = StageSummary(
            "",
            (stage.index,),
            _count_operators(calls),
            sum(stored[name][0] for name in own),
            sum(stored[name][1] for name in own),
            {name: model.part(stage.nodes) for name, model in models.items()},
        )
        work = tuple((cost.flops, cost.cache_bytes) for cost in summary.costs.values())
        key = (tuple(summary.operators.items()), summary.weights, summary.weight_bytes, work)
        groups.setdefault(key, []).append((stage, summary))
    return tuple(_merge(group) for group in groups.values())


def _merge(group: Sequence[tuple[Stage, StageSummary]]) -> StageSummary:
    members, summaries = zip(*group, strict=True)
    first = summaries[0]
    costs = {
        name: Cost(
            cost.flops, max(s.costs[name].activation_bytes for s in summaries), cost.cache_bytes
        )
        for name, cost in first.costs.items()
    }
    indices = tuple(stage.index for stage in members)
    return StageSummary(
        _stage_name(members), indices, first.operators, first.weights, first.weight_bytes, costs
    )


def _stage_name(members: Sequence[Stage]) -> str:
    """What the names of the weights have in common; the stage's number where that is nothing."""
    names = fold_names(_common_name(stage.weights) for stage in members)
    if len(names) == 1 and names[0]:
        return names[0]
    return f"stage {fold_numbers(stage.index for stage in members)}"


def _common_name(weights: Sequence[str]) -> str:
    """``("a.0.up.weight", "a.0.down.weight")`` as ``a.0``; the modules of one or two weights."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in weights))
    if len(modules) < 3:
        return ", ".join(modules)
    columns = zip(*(name.split(".") for name in modules), strict=False)
    return ".".join(column[0] for column in takewhile(lambda parts: len(set(parts)) == 1, columns))


# --- Barriers --------------------------------------------------------------------------------


def _barriers(
    program: Program,
    found: Sequence[Stage],
    folded: Sequence[StageSummary],
    passed_over: Sequence[tuple[str, str]],
) -> Iterator[Barrier]:
    """What was passed over and is still there; `passed_over` pairs nodes with reasons."""
    names = {index: summary.name for summary in folded for index in summary.stages}
    place = {node.name: names[stage.index] for stage in found for node in stage.nodes}
    reasons: dict[str, list[str]] = {}
    for name, reason in passed_over:
        reasons.setdefault(name, []).append(reason)
    for node in program.graph.nodes:
        for reason in dict.fromkeys(reasons.get(node.name, ())):
            operator = node.op if node.op != "call_function" else format_target(node.target)
            yield Barrier(node.name, operator, place.get(node.name, ""), reason)


def _skips(records: Sequence[PassRecord]) -> Iterator[tuple[str, str]]:
    """Where passes might have applied and did not, and why."""
    for record in records:
        for skip in record.result.skips:
            yield skip.node, skip.reason


def _one_line(error: QCompileError) -> str:
    return " ".join(error.message.split())
