"""Every named recipe ends in artifacts that generate text, and both targets for CPUs agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.conftest import TinyCheckpoint

import qcompile as qc
from qcompile.recipe import load_recipe, recipe_names

pytestmark = pytest.mark.slow

FEW_STEPS = {"signround": 4, "omniquant": 4}
"""Of methods that learn: what they find is no matter here."""


@pytest.fixture(scope="module")
def program(tiny_checkpoint: TinyCheckpoint) -> qc.Program:
    return qc.capture(tiny_checkpoint("llama"))


def quick(name: str) -> qc.Recipe:
    """A recipe that is done in seconds."""
    recipe = load_recipe(name)
    for step in recipe.steps:
        method = getattr(step.options, "method", None)
        if method in FEW_STEPS:
            return load_recipe(recipe, {f"{step.name}.options": {"steps": FEW_STEPS[method]}})
        if step.name == "spinquant":
            return load_recipe(recipe, {"spinquant.steps": 2})
    return recipe


@pytest.mark.parametrize("name", recipe_names())
def test_artifacts_of_both_targets_generate_and_agree(
    program: qc.Program, tmp_path: Path, name: str
) -> None:
    ids = np.arange(1, 25).reshape(2, 12)
    logits = []
    for target in ("cpu", "onnx"):
        artifact = qc.compile(
            program,
            quick(name),
            target,
            tmp_path / target,
            threads=1,
            calibration_samples=4,
            calibration_length=32,
            work_dir=tmp_path / "work",
        )
        assert artifact.generate("Hello", max_new_tokens=4)
        logits.append(artifact.forward(ids))
    # Two implementations that share the weights and nothing else. Where activations are rounded,
    # the last bit of a sum can move a code, and with it all that its token becomes.
    bound = 1e-4 * np.abs(logits[1]).max()
    agree = np.isclose(*logits, rtol=0.0, atol=bound).all(-1)
    assert agree.mean() > 0.9
