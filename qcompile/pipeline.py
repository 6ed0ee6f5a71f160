"""The compilation, readable from top to bottom: which passes a recipe means, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qcompile.ir.types import Fact
from qcompile.passes.canonicalize import canonicalize_phase
from qcompile.passes.infra import Pass, Phase
from qcompile.passes.quantize.allocation.quantize_to_budget import quantize_weights
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_cache import QuantizeCache
from qcompile.passes.quantize.quantize_clusters import QuantizeClusters
from qcompile.passes.raise_ops import raise_phase
from qcompile.passes.transform.atq import Atq
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.duquant import Duquant
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.quip import Quip
from qcompile.passes.transform.resq import Resq
from qcompile.passes.transform.rotate import Rotate
from qcompile.passes.transform.rptq import Rptq
from qcompile.passes.transform.smooth import Smooth
from qcompile.passes.transform.spinquant import Spinquant
from qcompile.recipe import Recipe, StepOptions
from qcompile.recipe_schema import TRANSFORM_STEPS

PASSES: Mapping[str, Callable[..., Pass]] = {
    "rotate": Rotate,
    "smooth": Smooth,
    "duquant": Duquant,
    "spinquant": Spinquant,
    "resq": Resq,
    "quip": Quip,
    "rptq": Rptq,
    "atq": Atq,
    "quantize_weights": quantize_weights,
    "quantize_activations": QuantizeActivations,
    "quantize_clusters": QuantizeClusters,
    "quantize_cache": QuantizeCache,
}
"""The pass behind each step of a recipe; it takes the step's options by name."""


def front_phases() -> tuple[Phase, ...]:
    """What every captured program goes through before a recipe is applied."""
    return (canonicalize_phase(), raise_phase())


def recipe_phases(recipe: Recipe) -> tuple[Phase, ...]:
    """The steps of a recipe, each a phase of its own."""
    return tuple(Phase(step.name, _make(step.name, step.options)) for step in recipe.steps)


def _make(name: str, options: StepOptions) -> tuple[Pass, ...]:
    """The passes of a step: rotations find bare norms, and what transforms leave is fused."""
    made = make_pass(name, options)
    bare = (FoldNormGain(), CentreNorms()) if Fact.GAINS_FOLDED in made.requires else ()
    fused = (FuseTransforms(),) if name in TRANSFORM_STEPS else ()
    return (*bare, made, *fused)


def make_pass(name: str, options: StepOptions) -> Pass:
    """The pass behind a step."""
    return PASSES[name](**{key: getattr(options, key) for key in type(options).model_fields})
