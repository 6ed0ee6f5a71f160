"""The table of transforms: rows are recipes, cells outlive a run, outliers change no function."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import qcompile as qc
from qcompile.recipe import load_recipe

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "Rotations spread what stands out over all channels. " * 12


def _rows() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "transform_rows", BENCHMARKS / "transform_rows.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ROWS = _rows()


@pytest.mark.parametrize("column", [*ROWS.PRECISIONS, ROWS.OUTLIERS])
@pytest.mark.parametrize("method", ROWS.METHODS)
def test_cells_are_recipes_that_round_weights_per_row(method: str, column: str) -> None:
    precision, row = ROWS.precision_of(column), ROWS.METHODS[method]
    steps = [*row.transforms(precision), *row.quantization(precision)]
    recipe = load_recipe({"name": "cell", "steps": steps})
    options = next(s.options for s in recipe.steps if s.name == "quantize_weights")
    expected = "gptq" if method.endswith(", gptq") else "rtn"
    assert (options.method, options.format) == (expected, precision.weights)


def _run(model: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    text = folder / "text.txt"
    text.write_text(TEXT)
    sizes = ("--tokens", "64", "--window", "32", "--samples", "2")
    files = ("--model", str(model), "--text", str(text), "--output", str(folder / "cells.json"))
    command = [sys.executable, str(BENCHMARKS / "transforms.py"), *files, *sizes, *arguments]
    # The benchmark imports its neighbours, as scripts may.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_finished_cells_are_not_measured_again(tiny_checkpoint: Any, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama")
    cells = ("--methods", "none", "smoothquant, quarot", "--columns", ROWS.OUTLIERS)
    first = _run(model, tmp_path, *cells)
    kept = (tmp_path / "cells.json").read_text()
    rows = json.loads(kept)["rows"]
    assert [row["method"] for row in rows] == ["none", "smoothquant, quarot"]
    # 64 times larger channels cost the plain model, and not the transformed one.
    assert rows[0]["kl"] > 3 * rows[1]["kl"]
    again = _run(model, tmp_path, *cells)
    assert (tmp_path / "cells.json").read_text() == kept
    assert "smoothquant, quarot" in again.stdout
    assert (len(first.stderr.splitlines()), again.stderr) == (2, "")


def test_artificial_outliers_keep_the_function(
    tiny_checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # A script beside the package: type checkers do not look there.
    import transforms  # type: ignore[import-not-found]

    clean = qc.capture(str(tiny_checkpoint("llama")))
    spoiled = transforms.with_artificial_outliers(clean)
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spoiled(ids).logits, clean(ids).logits, rtol=1e-4, atol=1e-4)
    gain = spoiled.weights.materialize("model.layers.0.input_layernorm.weight")
    assert int((gain.abs() > 32).sum()) == transforms.OUTLIER_CHANNELS
