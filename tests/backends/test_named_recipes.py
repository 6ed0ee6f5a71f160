"""Every recipe that has a name ends in artifacts that generate text, on every target that can run here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qcompile.artifact import Artifact
from qcompile.compiler import compile
from qcompile.recipe import recipe_names

QUICK = {"spinquant": ["spin.steps=2"]}


@pytest.mark.parametrize("recipe", recipe_names())
def test_named_recipes_generate_the_same_on_cpu_and_onnx(
    tiny_checkpoint, tmp_path: Path, recipe: str
) -> None:
    checkpoint = tiny_checkpoint("llama")
    ids = np.arange(1, 25).reshape(2, 12)
    made = []
    for target in ("cpu", "onnx"):
        artifact = compile(
            checkpoint,
            recipe=recipe,
            target=target,
            output=tmp_path / target,
            threads=1,
            calibration_samples=4,
            calibration_length=32,
            work_dir=tmp_path / "work",
        )
        assert len(artifact.generate("Hello", max_new_tokens=4)) > 0
        made.append(artifact.forward(ids))
    print(recipe, np.abs(made[0]-made[1]).max()/np.abs(made[1]).max())
