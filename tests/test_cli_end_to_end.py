"""The command line on a tiny model with nothing replaced: compile, run, eval, interruptions."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qcompile.cli import main
from qcompile.progress import NullProgress, Progress

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint


@pytest.fixture(scope="module")
def model(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("artifacts") / "tiny"
    assert main(["compile", str(model), "-o", str(output), "--quiet"]) == 0
    return output


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    capsys.readouterr()
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_compile_reports_sizes_bits_and_times(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    document = run_json(capsys, "compile", str(model), "-o", str(output), "-r", "w8-rtn")
    assert document["artifact"] == str(output)
    assert document["recipe"]["name"] == "w8-rtn"
    assert document["bits"]["advertised_bits_per_weight"] == 8
    assert document["bytes"] == sum(
        path.stat().st_size
        for path in output.iterdir()
        if path.name not in {"manifest.json", "report.json"}
    )
    assert document["report"]["seconds"]["pack"] >= 0


def test_setting_reaches_the_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    settings = ["--set", "quantize_weights.overrides=[{match: '*down_proj*', format: float}]"]
    document = run_json(capsys, "compile", str(model), "-o", output, "-r", "w8a8-rtn", *settings)
    formats = {t["name"]: t["format"] for t in document["report"]["tensors"]}
    down = {name: format for name, format in formats.items() if "down_proj" in name}
    assert down
    assert set(down.values()) == {"float32"}
    assert formats[next(iter(down)).replace("down_proj", "up_proj")] == "int8"


def test_run_generates_the_same_text_twice(
    artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(artifact), "hello", "--raw", "--max-new-tokens", "5"]
    first, second = (run_json(capsys, *arguments) for _ in range(2))
    assert first["prompt_tokens"] == len("hello")
    assert 1 <= first["new_tokens"] <= 5
    assert first["text"] == second["text"]


def test_eval_of_a_model_against_itself_finds_no_divergence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    assert main(["compile", str(model), "-o", output, "-r", "float", "-q"]) == 0
    size = ["--window", "32", "--max-tokens", "64"]
    figures = run_json(capsys, "eval", output, "--reference", str(model), *size)
    assert math.isfinite(figures["perplexity"])
    assert figures["kl"] == pytest.approx(0, abs=1e-6)  # both in float32, sums in another order
    assert figures["top1_agreement"] == 1
    assert figures["tokens"] == 2 * 31


def test_output_that_exists_is_kept(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (artifact / "manifest.json").read_bytes()
    error = run_json(capsys, "compile", "absent-model", "-o", str(artifact), code=5)["error"]
    assert str(artifact) in error["message"]
    assert (artifact / "manifest.json").read_bytes() == before


def test_existing_output_is_replaced_only_when_asked(
    model: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (artifact / "manifest.json").read_bytes()
    capsys.readouterr()
    assert main(["compile", str(model), "-o", str(artifact), "-r", "float", "-q"]) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "overwrite" in captured.err
    assert (artifact / "manifest.json").read_bytes() == before


class InterruptedAt(NullProgress):
    """Ctrl-C when a stage begins."""

    def __init__(self, name: str) -> None:
        self._name = name

    def stage(self, name: str, total: int | None = None) -> None:
        if name == self._name:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["capture", "pack"])
def test_interrupted_compile_leaves_nothing(
    stage: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def interrupting(*, quiet: bool = False) -> Iterator[Progress]:
        yield InterruptedAt(stage)

    monkeypatch.setattr("qcompile.console.show_progress", interrupting)
    assert main(["compile", str(model), "-o", str(tmp_path / "out")]) == 130
    assert list(tmp_path.iterdir()) == []
