"""Mixtures of experts, compiled: quantized throughout, exact, as large as predicted, talking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.backends.cpu.test_backend import assert_close, interpret
from tests.frontends.tiny_models import CORE, VOCABULARY, raised_tiny_model
from tests.passes.quantize.moe import experts

from qcompile.backends.cpu import expert_ops
from qcompile.backends.cpu.lower import lower_phase
from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.compiler import compile
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.legality import preflight
from qcompile.passes.infra import Context, PassManager, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

MODELS = ("mixtral", "qwen3-moe", "gpt-oss", "qwen2-moe", "glm4-moe", "granite-moe", "phi-moe")
MODELS += ("deepseek-v2", "deepseek-v3", "olmoe", "ernie4.5-moe", "flex-olmo", "minimax-m2")
MODELS += ("granite-moe-shared", "dots1")
EACH = [m if m in CORE else pytest.param(m, marks=pytest.mark.exhaustive) for m in MODELS]

TOKENS = np.random.default_rng(1).integers(2, VOCABULARY, (8, 32))


@pytest.mark.parametrize("recipe", ["w4-rtn", "w4-gptq", "w4a8-rtn"])
@pytest.mark.parametrize("model", EACH)
def test_compiled_mixture_equals_the_program_and_generates(
    model: str, recipe: str, tmp_path: Path
) -> None:
    program = raised_tiny_model(model)[1]
    planned = preflight(program, load_recipe(recipe), "cpu")
    artifact = compile(
        program, recipe, output=tmp_path / "out", calibration=TOKENS, threads=1, check="off"
    )
    context = Context(calibration=Calibration(TokenWindows(TOKENS)))
    after, _ = PassManager(recipe_phases(load_recipe(recipe))).run(program, context)
    ids = np.random.default_rng(0).integers(2, VOCABULARY, (2, 9))
    assert_close(artifact.forward(ids), interpret(after, ids), recipe)
    assert artifact.complete([5, 6, 7], max_new_tokens=4)[0].token_ids

    nodes = onnx.load(artifact.path / "model.onnx", load_external_data=False).graph.node
    mixtures = len(list(program.calls(dialect.experts)))
    assert [node.op_type for node in nodes].count("QExperts") == mixtures
    verdicts = {v.name: v for v in planned.layers if "experts" in v.parts}
    assert len(verdicts) == 2 * mixtures
    assert all(verdict.format.startswith("int4") for verdict in verdicts.values())
    assert planned.estimate is not None
    assert planned.estimate.exact
    for name, size in planned.estimate.files.items():
        assert (artifact.path / name).stat().st_size == size


FORMATS = (
    "int4-g16-asym",
    "int4-g16-asym16",
    "int3",
    "int8-g16-bf16",
    "nf4-g16-dq",
    "nvfp4",
    "mxfp4",
    "fp8",
)
FORMATS += ("ternary-g16", "(-1.5,-0.25,0.5,1.5)-g16")


@pytest.mark.parametrize("format", FORMATS)
def test_lowered_experts_equal_the_decoded_ones(format: str) -> None:
    step = QuantizeWeights(format, ignore=["router*", "shared*"])
    program = run_passes(experts(bias=True), [step])
    lowered = run_passes(program, list(lower_phase().passes))
    assert not list(lowered.calls(dialect.experts))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(lowered(x), program(x), rtol=1e-6, atol=1e-6)


def test_experts_of_which_one_matrix_is_float_are_left_to_standard_operators() -> None:
    step = QuantizeWeights("int4-g16", ignore=["router*", "shared*", "down"])
    program = run_passes(experts(), [step])
    lowered = run_passes(program, list(lower_phase().passes))
    assert len(list(lowered.calls(dialect.experts))) == 1


def rounded(weights: str, **options: Any) -> Program:
    steps = [
        QuantizeWeights(weights, ignore=["router*", "shared*"]),
        QuantizeActivations(**options),
    ]
    return run_passes(experts(bias=True), steps)


@pytest.mark.parametrize("weights", ["int4-g16-asym", "int3", "ternary-g16", "mxfp4"])
@pytest.mark.parametrize("granularity", ["token", "group"])
def test_rounding_on_both_sides_is_the_kernels(weights: str, granularity: str) -> None:
    program = rounded(weights, granularity=granularity)
    lowered = run_passes(program, list(lower_phase().passes))
    (node,) = lowered.calls(expert_ops.experts)
    grouped = granularity == "group" and weights != "int3"
    assert node.args[-1] == ("int8_group" if grouped else "int8_token")
    assert not list(lowered.calls(dialect.quantize, dialect.expert_hidden))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(lowered(x), program(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "options"), [("nf4-g16", {}), ("int4-g16", {"format": "fp8"})], ids=str
)
def test_rounding_that_the_kernel_does_not_do_is_left_to_standard_operators(
    weights: str, options: dict[str, str]
) -> None:
    lowered = run_passes(rounded(weights, **options), list(lower_phase().passes))
    assert not list(lowered.calls(expert_ops.experts))
    assert len(list(lowered.calls(dialect.expert_output))) == 1
