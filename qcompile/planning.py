"""A compilation without the work: the program that a recipe will make, and no weight read.

The planned program is the compiled one, node for node, except that the codes behind its weights
are shapes only. It can be printed, counted, checked and lowered, but not run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.formats import Format, QuantizedWeight
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import (
    Context,
    Lossy,
    Numerics,
    Pass,
    PassManager,
    PassRecord,
    PassResult,
    Phase,
)
from qcompile.passes.quantize.activation_formats import Grid
from qcompile.passes.quantize.allocation.plan import candidate_formats, open_weights, stand_ins
from qcompile.passes.quantize.layers import LayerWeight, layer_weights
from qcompile.passes.quantize.policy import FormatPolicy
from qcompile.passes.quantize.quantize_activations import (
    QuantizeActivations,
    RoundedInput,
    Rounding,
)
from qcompile.passes.quantize.quantize_clusters import QuantizeClusters
from qcompile.passes.quantize.replace_weight import replace_weight
from qcompile.pipeline import make_pass, recipe_phases
from qcompile.planned_transforms import PLANNED_TRANSFORMS
from qcompile.recipe import QuantizeWeights, Recipe, StepOptions
from qcompile.recipe_schema import DATA_FREE_TRANSFORMS, TRANSFORM_STEPS, Step


@dataclass(frozen=True)
class PlannedWeight:
    """What a recipe decides for one weight.

    Attributes:
        name: Its entry in the weight store.
        parts: What it does in the model, such as ``("embedding", "lm_head")``.
        shape: Its shape.
        format: Its format, or None if it stays float.
        reason: Why it stays float; empty otherwise.
        conflict: Why no format can be chosen, or None.
        alternatives: Where a budget decides, what else the format may become.
    """

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    format: Format | None
    reason: str = ""
    conflict: RecipeError | None = None
    alternatives: tuple[Format, ...] = ()


@dataclass(frozen=True)
class WeightPlan:
    """What a recipe decides for all weights.

    Attributes:
        weights: In graph order: those that can become codes, then the others of two and more
            dimensions.
        unmatched: Patterns of the recipe that match no weight.
    """

    weights: tuple[PlannedWeight, ...]
    unmatched: tuple[str, ...] = ()


def plan_weights(program: Program, recipe: Recipe) -> WeightPlan:
    """The format of every weight, without a look at its numbers.

    Args:
        program: In canonical form.
        recipe: The recipe; without a step that quantizes weights all stay float.
    """
    found, excluded = layer_weights(program)
    options = next(
        (o for step in recipe.steps if isinstance(o := step.options, QuantizeWeights)), None
    )
    policy = None if options is None else _policy(program, options)
    weights = [_decide(program, policy, weight) for weight in found]
    if options is not None and options.has_budget:
        candidates = candidate_formats(options.format, options.candidates)
        is_open = {w.name for w in open_weights(found, options.ignore, options.overrides)}
        weights = [
            replace(weight, alternatives=candidates) if weight.name in is_open else weight
            for weight in weights
        ]
    weights += [
        PlannedWeight(name, (), program.weights.spec(name).shape, None, reason)
        for name, reason in excluded.items()
    ]
    unmatched = policy.unmatched(weight.name for weight in weights) if policy is not None else ()
    return WeightPlan(tuple(weights), tuple(unmatched))


def planned_phases(recipe: Recipe) -> tuple[Phase, ...]:
    """The steps of a recipe as phases that read no weight and no data.

    Transforms that are chosen from data are random ones in their place, or, where they only change
    weights, left out.
    """
    return tuple(
        _planned(step, phase)
        for step, phase in zip(recipe.steps, recipe_phases(recipe), strict=True)
    )


def _planned(step: Step, phase: Phase) -> Phase:
    if step.name in PLANNERS:
        return Phase(step.name, (PLANNERS[step.name](step.options),))
    if step.name in TRANSFORM_STEPS - DATA_FREE_TRANSFORMS:
        chooser = type(make_pass(step.name, step.options))
        stand_in = PLANNED_TRANSFORMS.get(step.name)
        instead = () if stand_in is None else (stand_in(**_by_name(step.options)),)
        passes = ((p,) if type(p) is not chooser else instead for p in phase.passes)
        return Phase(step.name, tuple(itertools.chain.from_iterable(passes)))
    return phase


def plan(
    program: Program,
    recipe: Recipe,
    *,
    on_phase: Callable[[str, Program], None] | None = None,
) -> tuple[Program, list[PassRecord]]:
    """The program that a recipe makes of another one, without its numbers.

    Args:
        program: In canonical, raised form; it is not changed.
        recipe: The recipe.
        on_phase: Called with the name of each step and the program after it.

    Raises:
        RecipeError: The recipe contradicts itself about a weight.
    """
    return PassManager(planned_phases(recipe), on_phase=on_phase).run(program, Context())


def plan_transforms(program: Program, recipe: Recipe) -> tuple[Program, Recipe]:
    """What the transforms of a recipe make of a program, and the steps that are left.

    Layers may be split and ties undone, so that formats are chosen for other weights.

    Args:
        program: In canonical, raised form; it is not changed.
        recipe: The recipe.
    """
    transforms = tuple(step for step in recipe.steps if step.name in TRANSFORM_STEPS)
    if not transforms:
        return program, recipe
    others = tuple(step for step in recipe.steps if step.name not in TRANSFORM_STEPS)
    transformed, _ = plan(program, recipe.model_copy(update={"steps": transforms}))
    return transformed, recipe.model_copy(update={"steps": others})


class PlanWeights(Pass):
    """`quantize_weights` with codes that are shapes only.

    Args:
        options: Those of the step.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.WEIGHTS_QUANTIZED})
    numerics: ClassVar[Numerics] = Lossy()

    def __init__(self, options: StepOptions) -> None:
        self._options = cast(QuantizeWeights, options)

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "quantize_weights"

    def run(self, program: Program, context: Context) -> PassResult:
        """Replaces every weight that the recipe gives a format.

        Raises:
            RecipeError: A tied weight is given two formats.
        """
        del context
        result = PassResult()
        policy = _policy(program, self._options)
        for weight in layer_weights(program)[0]:
            format = policy.decide(weight).format
            if format is not None:
                shape = program.weights.spec(weight.name).shape
                replace_weight(program, weight, _without_numbers(format, shape))
                result.rewrites += 1
        return result


class PlanActivations(QuantizeActivations):
    """`quantize_activations` with static scales that are shapes only.

    Args:
        options: Those of the step.
    """

    def __init__(self, options: StepOptions) -> None:
        super().__init__(**_by_name(options))

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "quantize_activations"

    def _choose(
        self, program: Program, inputs: Sequence[RoundedInput], context: Context
    ) -> list[Rounding]:
        del program, context
        return [self._planned(group) for group in inputs]

    def _planned(self, group: RoundedInput) -> Rounding:
        """The first format that an input may get; all that it may get cost the same."""
        format = group.choice.candidates[0]
        shape = self.scale_shape(group)
        if shape is None:
            return Rounding(format)
        unknown = torch.empty(shape, device="meta")
        return Rounding(format, format.grid(unknown, unknown))


class PlanClusters(QuantizeClusters):
    """`quantize_clusters` with grids that are shapes only.

    Args:
        options: Those of the step.
    """

    def __init__(self, options: StepOptions) -> None:
        super().__init__(**_by_name(options))

    @property
    def name(self) -> str:
        """That of the pass whose work it plans."""
        return "quantize_clusters"

    def grids(
        self, program: Program, inputs: Mapping[fx.Node, Sequence[fx.Node]], context: Context
    ) -> dict[fx.Node, Grid[Tensor]]:
        """Grids without numbers."""
        del program, context
        widths = {x: int(x.meta["val"].shape[-1]) for x in inputs}
        return {
            x: Grid(
                torch.empty(width, device="meta"),
                torch.empty(width, dtype=torch.uint8, device="meta"),
            )
            for x, width in widths.items()
        }


PLANNERS: Mapping[str, Callable[[StepOptions], Pass]] = MappingProxyType(
    {
        "quantize_weights": PlanWeights,
        "quantize_activations": PlanActivations,
        "quantize_clusters": PlanClusters,
    }
)
"""For each step whose pass reads weights, a pass that makes the same program without reading."""


def _policy(program: Program, options: QuantizeWeights) -> FormatPolicy:
    """The policy of a step; where a budget decides, one that comes near it without measuring."""
    own = [{"match": item.match, "format": item.format} for item in options.overrides]
    return FormatPolicy.of(
        options.format,
        embedding=options.embedding,
        lm_head=options.lm_head,
        ignore=options.ignore,
        overrides=[*stand_ins(program, options), *own],
    )


def _by_name(options: StepOptions) -> dict[str, Any]:
    return {key: getattr(options, key) for key in type(options).model_fields}


def _decide(program: Program, policy: FormatPolicy | None, weight: LayerWeight) -> PlannedWeight:
    parts = tuple(sorted(part.value for part in weight.parts))
    shape = program.weights.spec(weight.name).shape
    if policy is None:
        return PlannedWeight(weight.name, parts, shape, None, "the recipe quantizes no weights")
    try:
        decision = policy.decide(weight)
    except RecipeError as conflict:
        return PlannedWeight(weight.name, parts, shape, None, conflict=conflict)
    return PlannedWeight(weight.name, parts, shape, decision.format, decision.reason)


def _without_numbers(format: Format, shape: tuple[int, ...]) -> QuantizedWeight:
    tensors = {
        name: torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        for name, spec in format.tensors(shape).items()
    }
    return QuantizedWeight(format, shape, tensors)
