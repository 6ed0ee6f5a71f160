"""Transforms and low-bit activations in compiled models, against the interpreted program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.backends.cpu.test_backend import assert_close, interpret, some_ids

from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.compiler import compile
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from tests.backends.cpu.conftest import Artifacts, Models

QUAROT = "w4a8-quarot-rtn"

TOKENS = np.random.default_rng(1).integers(2, 250, (8, 32))

STATIC: dict[str, Any] = {
    "name": "static",
    "steps": [
        {"smooth": {"strength": 0.5}},
        {"quantize_weights": {"format": "int8"}},
        {"quantize_activations": {"format": "int8", "granularity": "tensor"}},
    ],
}


def after_recipe(program: Program, recipe: Recipe) -> Program:
    context = Context(calibration=Calibration(TokenWindows(TOKENS)))
    return PassManager(recipe_phases(recipe)).run(program, context)[0]


@pytest.mark.parametrize("model", ["llama-tied", "qwen2"])
def test_model_with_online_rotations_compiles_and_decodes(
    model: str, program: Models, tmp_path: Path
) -> None:
    after = after_recipe(program(model), load_recipe(QUAROT))
    assert len(list(after.calls(dialect.transform))) == 2  # one per layer
    artifact = compile(program(model), recipe=QUAROT, output=tmp_path / "out", threads=1)
    ids = some_ids(2, 9)
    assert_close(artifact.forward(ids), interpret(after, ids), "w4a8-rtn")
    assert len(artifact.generate([5, 6, 7], max_new_tokens=4)) >= 1


def test_rotated_keys_are_cached_rotated(
    program: Models, artifact: Artifacts, tmp_path: Path
) -> None:
    recipe = load_recipe(
        {"name": "rotated", "steps": [{"rotate": {"online": ["down_proj", "o_proj", "query_key"]}}]}
    )
    after = after_recipe(program("llama"), recipe)
    rotated = compile(program("llama"), recipe=recipe, output=tmp_path / "out", threads=1)
    ids = some_ids(2, 9)
    expected = interpret(program("llama"), ids)
    assert_close(interpret(after, ids), expected, "float")
    assert_close(rotated.forward(ids), expected, "float")
    prompt = ids[0].tolist()
    plain = artifact("llama", "float").generate(prompt, max_new_tokens=8)
    assert rotated.generate(prompt, max_new_tokens=8) == plain


def test_static_activations_run_after_smoothing(program: Models, tmp_path: Path) -> None:
    recipe = load_recipe(STATIC)
    after = after_recipe(program("llama"), recipe)
    artifact = compile(
        program("llama"),
        recipe=recipe,
        output=tmp_path / "out",
        threads=1,
        calibration=torch.from_numpy(TOKENS),
        work_dir=tmp_path / "work",
    )
    ids = some_ids(2, 9)
    assert_close(artifact.forward(ids), interpret(after, ids), "w8a8-rtn")


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_activations_in_8_bit_floats_compile_and_decode(
    program: Models, tmp_path: Path, granularity: str
) -> None:
    overrides = {"quantize_activations.granularity": granularity}
    recipe = load_recipe("w8a8-fp8", overrides)
    after = after_recipe(program("llama"), recipe)
    artifact = compile(
        program("llama"),
        recipe=recipe,
        output=tmp_path / "out",
        threads=1,
        calibration=torch.from_numpy(TOKENS),
        work_dir=tmp_path / "work",
    )
    ids = some_ids(2, 9)
    assert_close(artifact.forward(ids), interpret(after, ids), "w8a8-rtn")
    assert len(artifact.generate([5, 6, 7], max_new_tokens=4)) >= 1
