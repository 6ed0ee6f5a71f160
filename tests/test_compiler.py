"""`compile`, `capture` and `evaluate`: what they accept, and what they leave behind."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import qcompile as qc
from qcompile.compiler import tokenizer_of
from qcompile.errors import ArtifactError, DataError, ModelError, QCompileError, RecipeError
from qcompile.progress import NullProgress

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint

IDS = np.arange(1, 8)[None]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def program(checkpoint: Path) -> qc.Program:
    return qc.capture(checkpoint)


class Stages(NullProgress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.ended = False

    def stage(self, name: str, total: int | None = None) -> None:
        self.names.append(name)

    def done(self) -> None:
        self.ended = True


# --- What is compiled ------------------------------------------------------------------------


def test_directory_module_and_program_compile_to_the_same_function(
    checkpoint: Path, program: qc.Program, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    module = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logits = [
        qc.compile(model, recipe="w8-rtn", output=tmp_path / str(i)).forward(IDS)
        for i, model in enumerate((checkpoint, module, program))
    ]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(logits[0], logits[2])


def test_module_with_example_inputs_becomes_a_function_of_its_inputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    artifact = qc.compile(
        module, recipe="w8-rtn", output=tmp_path / "mlp", example_inputs=torch.randn(3, 32)
    )
    x = torch.randn(5, 32)
    (found,) = artifact.run({artifact.manifest.signature.inputs[0].name: x.numpy()}).values()
    expected = module(x).detach().numpy()
    # Codes of 8 bits err by half a step, 1/254 of the largest weight of a row.
    assert np.abs(found - expected).max() <= np.abs(expected).max() / 100
    assert artifact.manifest.task == "module"


def test_plain_module_asks_for_example_inputs() -> None:
    with pytest.raises(ModelError, match="example inputs") as error:
        qc.compile(nn.Linear(3, 3))
    assert "example_inputs" in str(error.value.remedy)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="a dict is not a model"):
        qc.capture({})  # type: ignore[arg-type]


def test_compiling_leaves_the_program_as_it_was(program: qc.Program, tmp_path: Path) -> None:
    before = program.text(), set(program.weights)
    qc.compile(program, output=tmp_path / "out")
    assert (program.text(), set(program.weights)) == before


# --- How -------------------------------------------------------------------------------------


def test_recipe_may_be_a_mapping_and_have_overrides(program: qc.Program, tmp_path: Path) -> None:
    recipe = {"name": "mine", "steps": [{"quantize_weights": {"format": "int4-g16"}}]}
    artifact = qc.compile(
        program,
        recipe=recipe,
        output=tmp_path / "out",
        overrides={"quantize_weights.format": "int8-g16"},
    )
    assert artifact.manifest.recipe["name"] == "mine"
    assert artifact.manifest.bits["advertised_bits_per_weight"] == 8


def test_unknown_recipe_target_and_thread_count_name_themselves(program: qc.Program) -> None:
    with pytest.raises(RecipeError, match="w4-rtm"):
        qc.compile(program, recipe="w4-rtm")
    with pytest.raises(RecipeError, match="toaster"):
        qc.compile(program, target="toaster")
    with pytest.raises(DataError, match="threads is 0"):
        qc.compile(program, threads=0)


def test_thread_count_of_torch_is_given_back(program: qc.Program, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    class Spy(NullProgress):
        def stage(self, name: str, total: int | None = None) -> None:
            seen.append(torch.get_num_threads())

    qc.compile(program, output=tmp_path / "out", threads=before + 1, progress=Spy())
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_progress_hears_the_phases_in_order_and_the_end(
    program: qc.Program, tmp_path: Path
) -> None:
    stages = Stages()
    qc.compile(program, output=tmp_path / "out", progress=stages)
    wanted = ["capture", "quantize weights", "lower", "pack"]
    assert [name for name in stages.names if name in wanted] == wanted
    assert stages.ended


def test_progress_ends_when_compiling_fails() -> None:
    stages = Stages()
    with pytest.raises(QCompileError):
        qc.compile("no/such/model", progress=stages)
    assert stages.ended


# --- What is left behind ---------------------------------------------------------------------


def test_output_is_named_after_model_recipe_and_target_by_default(
    program: qc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact = qc.compile(program, recipe="w8-rtn")
    assert artifact.path.name.endswith("-w8-rtn-cpu")
    assert [path.name for path in tmp_path.iterdir()] == [artifact.path.name]


def test_equal_compilations_write_equal_bytes(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (qc.compile(checkpoint, output=tmp_path / name) for name in ("a", "b"))
    assert first.manifest.model_dump(exclude={"model"}) == second.manifest.model_dump(
        exclude={"model"}
    )
    for name in first.manifest.files:
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name


def test_report_accounts_for_every_pass_and_tensor(program: qc.Program, tmp_path: Path) -> None:
    artifact = qc.compile(program, output=tmp_path / "out")
    report = json.loads((artifact.path / "report.json").read_text())
    names = [record["name"] for record in report["passes"]]
    assert "quantize_weights" in names
    assert {"quantize_weights", "lower", "pack"} <= report["seconds"].keys()
    quantized = [t for t in report["tensors"] if t["quantized"]]
    # Seven projections in each of two layers, and the tied embedding once.
    assert len(quantized) == 2 * 7 + 1
    assert artifact.report["source_bytes"] > 0


def test_manifest_counts_the_bytes_on_disk(program: qc.Program, tmp_path: Path) -> None:
    manifest = qc.compile(program, output=tmp_path / "out").manifest
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert {name: info.bytes for name, info in manifest.files.items()} == {
        name: size for name, size in sizes.items() if name not in ("manifest.json", "report.json")
    }
    stored = sizes["model.onnx"] + sizes["model.onnx.data"]
    assert manifest.bits["bytes"] <= manifest.bits["packed_bytes"] <= stored


# --- evaluate --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 8)
    return path


def test_evaluate_takes_directories_programs_and_artifacts_alike(
    checkpoint: Path, program: qc.Program, words: Path, tmp_path: Path
) -> None:
    artifact = qc.compile(program, recipe="float", output=tmp_path / "out")
    options = {"window": 32, "max_tokens": 128}
    results = [
        qc.evaluate(model, words, reference=program, **options)
        for model in (checkpoint, artifact, artifact.path)
    ]
    for result in results:
        assert result.perplexity == pytest.approx(results[0].perplexity, rel=1e-5)
        assert result.kl == pytest.approx(0, abs=1e-6)
        assert result.top1_agreement == 1
        assert result.tokens == 4 * 31


def test_evaluate_sees_what_rounding_costs(
    program: qc.Program, words: Path, tmp_path: Path
) -> None:
    options = {"reference": program, "window": 32, "max_tokens": 128}
    coarse, fine = (
        qc.evaluate(qc.compile(program, recipe=recipe, output=tmp_path / recipe), words, **options)
        for recipe in ("w4-rtn", "w8-rtn")
    )
    assert fine.kl is not None
    assert coarse.kl is not None
    assert 0 < fine.kl < coarse.kl


def test_temporary_directory_that_is_full_is_named_with_a_remedy(
    program: qc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.is_relative_to(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return written(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ArtifactError, match="No space left on device") as caught:
        tokenizer_of(program)
    assert caught.value.message.startswith(f"'{tmp_path}")
    assert "TMPDIR" in str(caught.value.remedy)
    assert not list(tmp_path.iterdir())


def test_temporary_directory_that_is_gone_is_named(
    program: qc.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ArtifactError, match=r"gone.*cannot be written: No such file or directory"):
        tokenizer_of(program)
