"""The export for NPU toolchains runs, and what it exports computes the model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch

import qcompile as qc
from qcompile.passes.infra import PassManager
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "export_npu.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("export_npu", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=True, max_position_embeddings=512)


def test_exported_model_generates_what_the_program_does(
    example: ModuleType, checkpoint: Path, tmp_path: Path
) -> None:
    """A prompt of two pieces, the second not full; ONNX Runtime rounds to int8 by default."""
    path = example.export(str(checkpoint), tmp_path / "exported")
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    phases = recipe_phases(load_recipe("w4-rtn"))
    program, _ = PassManager(phases).run(qc.capture(checkpoint))
    prompt = list(range(5, 25))
    found = list(example.generate(path, prompt, 3))
    tokens = list(prompt)
    for token in found:
        logits = program(torch.tensor([tokens])).logits[0, -1]
        # Rounding may choose between nearly equal tokens only.
        assert logits[token] >= logits.max() - 0.02 * logits.abs().max()
        tokens.append(token)
    assert len(found) == 3


def test_script_prints_its_operators_and_a_text(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(checkpoint), str(tmp_path / "exported")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert "DequantizeLinear" in first
    assert "Shape" not in first
