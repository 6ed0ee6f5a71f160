"""Recipes that learn blocks end in artifacts that compute as learned, and generate text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import qcompile as qc
from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.passes.infra import Context, PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe


@pytest.mark.parametrize("name", ["w4-signround", "w2-signround", "w4-omniquant"])
def test_artifact_computes_as_learned_and_writes(
    name: str,
    tiny_checkpoint,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    (step,) = load_recipe(name).steps
    options = {**step.options.model_dump(exclude_unset=True), "options": {"steps": 4, "batch": 2}}
    recipe = load_recipe({"name": name, "steps": [{step.name: options}]})
    windows = np.random.default_rng(0).integers(4, 260, (6, 16))
    program = qc.capture(tiny_checkpoint("llama"))
    artifact = qc.compile(
        program,
        recipe,
        output=tmp_path / "out",
        calibration=windows,
        calibration_length=16,
        work_dir=tmp_path / "work",
        check="off",
    )
    context = Context(calibration=Calibration(TokenWindows(windows)))
    learned = PassManager(recipe_phases(recipe)).run(program, context)[0]
    tokens = np.array([[1, 5, 9, 3]])
    expected = learned(torch.from_numpy(tokens)).logits.numpy()
    # Kernels add up float32 products in another order.
    np.testing.assert_allclose(artifact.forward(tokens), expected, rtol=1e-3, atol=1e-4)
    assert len(artifact.generate([5, 6, 7], max_new_tokens=4)) >= 1
