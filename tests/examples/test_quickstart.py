"""The first example that a newcomer runs."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import qcompile as qc

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


def test_tiny_model_is_made_compiled_asked_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    model = example["make_tiny_model"](tmp_path / "model")
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(model), str(output)])
    example["main"]()
    printed = capsys.readouterr().out
    size, *_, perplexity, agreement = printed.splitlines()
    assert re.fullmatch(r"model: \d\.\d\d bits per weight", size)
    # Random weights know nothing of the text: any token of 257 is about as likely as another.
    found = re.fullmatch(r"perplexity (\S+), before (\S+)", perplexity)
    assert found is not None
    assert all(abs(float(value) - 257) < 15 for value in found.groups())
    assert re.fullmatch(r"same most likely token at \d+% of 508 positions", agreement)
    assert qc.load(output).manifest.recipe["name"] == "w4a8-rtn"


def test_model_needs_no_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    model = runpy.run_path(str(EXAMPLE))["some_model"]()
    assert (tmp_path / model / "model.safetensors").is_file()
