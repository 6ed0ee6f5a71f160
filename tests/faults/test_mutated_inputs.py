"""Files that were damaged at random: an error of qcompile or none, never anything else.

No crash, no hang, and no allocation beyond what the whole file needs: the child that reads a
damaged file may take as much address space as one that reads the whole file, and a little more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from tests.faults.conftest import WarmProcess
from tests.faults.mutations import (
    Mutation,
    mutate_bytes,
    mutate_json,
    mutate_safetensors,
    mutate_yaml,
)
from tests.frontends.test_gguf import tiny_model, write_gguf

import qcompile as qc
from qcompile.recipe import load_recipe

SEEDS = 1000
FAST_SEEDS = 50
MEMORY = 512 << 20
"""Bytes of address space; reading any of the whole files takes less."""

TIMEOUT = 60.0
"""Seconds; reading the slowest of the whole files takes one or two."""


@dataclass(frozen=True)
class Input:
    """A file that qcompile reads.

    Attributes:
        root: Which of the good inputs holds it.
        file: Its name there; empty if it is all of the input.
        mutation: How it is damaged.
        job: What reads it; see `jobs.py`.
    """

    root: str
    file: str
    mutation: Mutation
    job: str


INPUTS = {
    "config": Input("checkpoint", "config.json", mutate_json, "capture"),
    "safetensors": Input("checkpoint", "model.safetensors", mutate_safetensors, "capture"),
    "generation config": Input("checkpoint", "generation_config.json", mutate_json, "capture"),
    "index": Input("sharded", "model.safetensors.index.json", mutate_json, "capture"),
    "gguf": Input("model.gguf", "", mutate_bytes, "capture"),
    "recipe": Input("recipe.yaml", "", mutate_yaml, "read_recipe"),
    "manifest": Input("cpu", "manifest.json", mutate_json, "use_artifact"),
    "report": Input("cpu", "report.json", mutate_json, "use_artifact"),
    "onnx": Input("cpu", "model.onnx", mutate_bytes, "use_artifact"),
    "onnx data": Input("cpu", "model.onnx.data", mutate_bytes, "use_artifact"),
    "model's tokenizer": Input("checkpoint", "tokenizer.json", mutate_json, "capture"),
    "tokenizer": Input("cpu", "tokenizer.json", mutate_json, "use_artifact"),
    "tokenizer config": Input("cpu", "tokenizer_config.json", mutate_json, "use_artifact"),
    "chat template": Input("cpu", "chat_template.jinja", mutate_bytes, "use_artifact"),
    "program": Input("cuda", "program.json", mutate_json, "use_artifact"),
    "weights": Input("cuda", "weights.safetensors", mutate_safetensors, "use_artifact"),
}


@pytest.fixture(scope="session")
def good(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of good inputs, by the names that `Input.root` has."""
    good = tmp_path_factory.mktemp("good")
    shutil.copytree(checkpoint, good / "checkpoint")
    _write_sharded(checkpoint, good / "sharded")
    model = tiny_model("llama", num_hidden_layers=1)
    write_gguf(good / "model.gguf", model, "llama", kind=lambda name: GGMLQuantizationType.Q8_0)
    recipe = load_recipe("w4a8-rtn", {"quantize_weights.ignore": ["lm_head"]})
    (good / "recipe.yaml").write_text(recipe.to_yaml())
    for target in ("cpu", "cuda"):
        qc.compile(checkpoint, target=target, output=good / target, threads=1)
    return good


def _write_sharded(checkpoint: Path, directory: Path) -> None:
    """The same model with every tensor in a shard of its own."""
    shutil.copytree(checkpoint, directory)
    weight_map = {}
    for i, (name, tensor) in enumerate(load_file(directory / "model.safetensors").items()):
        weight_map[name] = f"model-{i}.safetensors"
        save_file({name: tensor}, directory / weight_map[name])
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _copy(source: Path, destination: Path) -> Path:
    return Path(
        shutil.copytree(source, destination)
        if source.is_dir()
        else shutil.copy(source, destination)
    )


def _sign(artifact: Path, name: str) -> None:
    """Makes the manifest agree with a file, so that not only its hash can tell the damage."""
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    content = (artifact / name).read_bytes()
    if name in manifest["files"]:  # the report is not
        manifest["files"][name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
        path.write_text(json.dumps(manifest))


def _damage(kind: str, seed: int, good: Path, directory: Path) -> Path:
    """A copy of a good input with one file of it damaged."""
    given = INPUTS[kind]
    root = _copy(good / given.root, directory / given.root)
    path = root / given.file
    path.write_bytes(given.mutation(path.read_bytes(), Random(f"{kind} {seed}")))
    if given.root in ("cpu", "cuda") and given.file != "manifest.json":
        _sign(root, given.file)
    return root


@pytest.mark.parametrize("kind", INPUTS)
def test_good_input_is_read_within_the_limits(
    kind: str, good: Path, warm_process: WarmProcess
) -> None:
    given = INPUTS[kind]
    outcome = warm_process.run(
        given.job, path=str(good / given.root), memory=MEMORY, timeout=TIMEOUT
    )
    assert (outcome.status, outcome.result) == (0, None), outcome.output


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=() if seed < FAST_SEEDS else pytest.mark.exhaustive)
        for seed, kind in zip(range(SEEDS), itertools.cycle(INPUTS), strict=False)
    ],
)
def test_damaged_input_is_refused_by_name_or_read(
    kind: str, seed: int, good: Path, tmp_path: Path, warm_process: WarmProcess
) -> None:
    path = _damage(kind, seed, good, tmp_path)
    outcome = warm_process.run(INPUTS[kind].job, path=str(path), memory=MEMORY, timeout=TIMEOUT)
    assert outcome.status == 0, outcome.output[-4000:]
