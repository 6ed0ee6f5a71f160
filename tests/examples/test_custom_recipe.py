"""The example of a user's own recipe does what it says."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "custom_recipe.py"


def test_recipe_gives_every_layer_its_format(
    tiny_checkpoint: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_checkpoint("llama", tie_word_embeddings=False)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(model), str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    formats = dict(line.split()[:2] for line in lines if line.startswith("  "))
    assert "lm_head.weight" not in formats
    assert formats["model.embed_tokens.weight"] == "int8"
    layer = "model.layers.{}.mlp.{}.weight"
    assert formats[layer.format(1, "up_proj")] == "int4-g32-asym"
    assert formats[layer.format(1, "down_proj")] == "int8-g64"
    assert {formats[layer.format(0, kind)] for kind in ("up_proj", "down_proj")} == {"int8-g64"}
    careful, smaller = (float(line.split()[-4]) for line in (lines[0], lines[-1]))
    assert smaller < careful < 32
