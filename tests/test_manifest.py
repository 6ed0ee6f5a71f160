"""Reading a manifest never trusts it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompile.errors import ArtifactError
from qcompile.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    FileInfo,
    GenerationInfo,
    Manifest,
    ModelInfo,
    Signature,
    ValueInfo,
    describe_files,
    is_artifact,
    read_manifest,
    verify_files,
    write_manifest,
)


def value(name: str, role: str, shape: tuple[int | str, ...] = ("batch", 2)) -> ValueInfo:
    layer = 3 if role.startswith(("past", "present")) else None
    return ValueInfo.model_validate(
        {"name": name, "dtype": "float32", "shape": shape, "role": role, "layer": layer}
    )


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    directory = tmp_path / "artifact"
    (directory / "sub").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "sub" / "weights").write_bytes(b"weights" * 1000)
    (directory / "report.json").write_text("{}")
    manifest = Manifest(
        qcompile_version="0.1.0",
        target="cpu",
        kernel_layout_version=1,
        task="causal_lm",
        model=ModelInfo(name="m", architecture="Llama", source="dir", fingerprint="f"),
        recipe={"name": "w4", "steps": [{"quantize_weights": {"format": "int4-g32"}}]},
        signature=Signature(
            inputs=(value("k", "past_key"), value("v", "past_value")),
            outputs=(value("v2", "present_value"), value("k2", "present_key")),
        ),
        generation=GenerationInfo(eos_token_ids=(2, 3), max_context=64),
        bits={"weights": {"stored": 4.5, "advertised": 4}},
        metrics={"perplexity": 12.5},
        files=describe_files(directory),
    )
    write_manifest(directory, manifest)
    return directory


Edit = Callable[[dict[str, Any]], object]


def edit(artifact: Path, change: Edit) -> None:
    path = artifact / MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def test_manifest_reads_back_as_written(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert manifest.schema_version == SCHEMA_VERSION
    assert manifest.generation.eos_token_ids == (2, 3)
    assert manifest.recipe["name"] == "w4"
    assert manifest.signature.inputs[0].shape == ("batch", 2)
    assert manifest.metrics == {"perplexity": 12.5}
    write_manifest(artifact, manifest)
    assert read_manifest(artifact) == manifest


def test_described_files_are_all_but_manifest_and_report(artifact: Path) -> None:
    files = read_manifest(artifact).files
    assert files.keys() == {"model.onnx", "sub/weights"}
    assert files["sub/weights"].bytes == 7000
    # sha256 of b"graph", by sha256sum.
    assert files["model.onnx"].sha256.startswith("eef93e1d14482804")
    verify_files(artifact, read_manifest(artifact))


def test_cache_inputs_pair_with_the_outputs_that_replace_them(artifact: Path) -> None:
    pairs = read_manifest(artifact).signature.cache_pairs()
    assert [(past.name, present.name) for past, present in pairs] == [("k", "k2"), ("v", "v2")]


def test_unpaired_cache_is_refused() -> None:
    signature = Signature(inputs=(value("k", "past_key"),), outputs=())
    with pytest.raises(ArtifactError, match="key cache of layer 3"):
        signature.cache_pairs()


def test_directory_without_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere: it does not exist"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is not a directory"):
        read_manifest(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{\n  "schema_version": 1,\n  oops\n}', "line 3 column 3"),
        (b"", "line 1 column 1"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[" * 100_000, "not valid JSON: maximum recursion depth"),
        (b'{"schema_version": ' + b"9" * 5000 + b"}", "not valid JSON: Exceeds the limit"),
        (b"[]", "no schema_version"),
        (b'{"schema_version": "one"}', "no schema_version"),
        (b'{"schema_version": true}', "no schema_version"),
        (b'{"schema_version": 0}', "no schema_version"),
        (b'{"schema_version": 1}', "qcompile_version: Field required"),
    ],
)
def test_damaged_manifest_is_refused(artifact: Path, content: bytes, named: str) -> None:
    (artifact / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ArtifactError, match=named):
        read_manifest(artifact)


def test_oversized_manifest_is_refused_unread(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.manifest._MAX_MANIFEST_BYTES", 10)
    with pytest.raises(ArtifactError, match="too many for a manifest"):
        read_manifest(artifact)


def test_newer_schema_asks_for_an_upgrade(artifact: Path) -> None:
    edit(artifact, lambda raw: raw.update(schema_version=SCHEMA_VERSION + 1, novelty=1))
    with pytest.raises(ArtifactError, match="made by a newer qcompile") as caught:
        read_manifest(artifact)
    assert caught.value.remedy == "upgrade qcompile"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw.update(novelty=1), "novelty: Extra inputs"),
        (lambda raw: raw.update(task="poem"), "task: "),
        (lambda raw: raw["model"].pop("name"), "model.name: "),
        (lambda raw: raw["signature"]["inputs"][0].update(role="x"), "signature.inputs.0.role: "),
        (lambda raw: raw["signature"]["inputs"][0].update(dtype="f"), "signature.inputs.0.dtype: "),
        (lambda raw: raw["signature"]["inputs"][0].update(shape=[2**40]), "inputs.0.shape.0"),
        (lambda raw: raw["signature"]["inputs"][0].update(shape=[-1]), "inputs.0.shape.0"),
        (lambda raw: raw["generation"].update(max_context=0), "generation.max_context: "),
        (lambda raw: raw["generation"].update(eos_token_ids=[-1]), "generation.eos_token_ids.0"),
        (lambda raw: raw["files"]["model.onnx"].update(bytes=-1), "files.model.onnx.bytes: "),
        (lambda raw: raw["files"]["model.onnx"].update(bytes=2**60), "files.model.onnx.bytes: "),
        (lambda raw: raw["files"]["model.onnx"].update(sha256="ab"), "files.model.onnx.sha256: "),
    ],
)
def test_invalid_field_is_named(artifact: Path, change: Edit, named: str) -> None:
    edit(artifact, change)
    with pytest.raises(ArtifactError, match=named):
        read_manifest(artifact)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../b", "a//b", "./a", "", ".", "..\\secret", "C:secret"],
)
def test_file_name_that_leaves_the_directory_is_refused(artifact: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit(artifact, lambda raw: raw["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="leaves the artifact's directory"):
        read_manifest(artifact)


def test_missing_file_is_named(artifact: Path) -> None:
    (artifact / "sub" / "weights").unlink()
    with pytest.raises(ArtifactError, match="lacks its file sub/weights"):
        verify_files(artifact, read_manifest(artifact))


@pytest.mark.parametrize("hashes", [True, False])
def test_truncated_file_is_named_with_both_sizes(artifact: Path, hashes: bool) -> None:
    (artifact / "sub" / "weights").write_bytes(b"weights" * 999)
    with pytest.raises(ArtifactError, match=r"weights has 6993 bytes; the manifest says 7000"):
        verify_files(artifact, read_manifest(artifact), hashes=hashes)


def test_changed_file_is_named(artifact: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"Graph")
    manifest = read_manifest(artifact)
    verify_files(artifact, manifest, hashes=False)
    with pytest.raises(ArtifactError, match=r"model.onnx is damaged"):
        verify_files(artifact, manifest)


def test_artifacts_of_any_version_are_recognized(artifact: Path, tmp_path: Path) -> None:
    edit(artifact, lambda raw: raw.update(schema_version=99, novelty=1))
    assert is_artifact(artifact)
    assert not is_artifact(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text('{"name": "a web app"}')
    assert not is_artifact(tmp_path)


def test_values_cannot_be_changed() -> None:
    info = FileInfo(sha256="0" * 64, bytes=1)
    with pytest.raises(ValueError, match="frozen"):
        info.bytes = 2
