"""Recipes of other than evenly spaced grids, and of a budget, end in artifacts that generate."""

from __future__ import annotations

import pytest
import torch

from qcompile.compiler import compile


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        *(("w4-higgs", "cpu"), ("w4-llm-fp4", "cpu"), ("w3-budget", "cpu")),
        ("w2-higgs-gptq", "cpu"),
        *(("w4a4-llm-fp4", "cpu"), ("w4a4-llm-fp4", "onnx")),
    ],
)
def test_recipes_end_in_artifacts_that_generate_text(
    program, tmp_path, recipe: str, target: str
) -> None:
    artifact = compile(
        program("llama"),
        recipe=recipe,
        target=target,
        output=tmp_path / "a",
        threads=1,
        calibration_samples=4,
        calibration_length=32,
        work_dir=tmp_path / "work",
    )
    assert artifact.generate("Hello", max_new_tokens=4) is not None
    ids = torch.arange(12).reshape(2, 6)
    assert bool(torch.from_numpy(artifact.forward(ids.numpy())).isfinite().all())
    if recipe == "w3-budget":
        (note,) = (note for note in artifact.report["notes"] if "formats chosen" in note)
        assert "predicted" in note
        assert "measured" in note
