"""Named recipes of transform methods, from a checkpoint to an artifact that generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompile as qc
from qcompile.errors import TargetError

TEXT = "Rotations spread what stands out over all channels. " * 60

FEW_STEPS: dict[str, dict[str, Any]] = {
    "w8a8-atq": {},
    "w8a8-quarot-rtn": {},
    "w4-awq-rtn": {},
    "w3-quip-gptq": {},
    "w4a8-rptq": {},
    "w4a4-duquant-rtn": {"duquant.steps": 4},
    "w4a4-spinquant-rtn": {"spinquant.steps": 2},
    "w4a4-resq-rtn": {},
}
"""Recipes, and what makes them quick."""


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.mark.parametrize("recipe", FEW_STEPS)
def test_recipe_compiles_under_all_checks_and_generates(
    recipe: str, tiny_checkpoint: Any, text: str, tmp_path: Path
) -> None:
    artifact = qc.compile(
        tiny_checkpoint("llama", tie_word_embeddings=True),
        recipe,
        "cpu",
        tmp_path / "artifact",
        overrides=FEW_STEPS[recipe],
        calibration=text,
    )
    logits = artifact.forward(np.array([[1, 50, 7, 9]]))
    assert logits.shape[-1] == 260
    assert np.isfinite(logits).all()
    assert isinstance(artifact.generate("one two", max_new_tokens=3), str)


def test_four_bit_activations_are_refused_before_any_work(
    tiny_checkpoint: Any, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="cannot run"):
        qc.compile(tiny_checkpoint("llama"), "w4a4-duquant-rtn", "cuda", tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
