"""Bad input at the front door, through Python and through the command line.

Whatever is wrong: one error that names the culprit, an exit code that is not 0, no half-written
output, and an output that stood there before is still whole.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import qcompile as qc
from qcompile.cli import main
from qcompile.errors import (
    ArtifactError,
    DataError,
    ModelError,
    QCompileError,
    RecipeError,
    TargetError,
)

if TYPE_CHECKING:
    from tests.conftest import TinyCheckpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint("llama", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact; tests must not write into it."""
    return qc.compile(checkpoint, output=tmp_path_factory.mktemp("made") / "artifact").path


@pytest.fixture
def broken(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# --- Models and recipes that cannot be compiled ----------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A compilation that must fail.

    Attributes:
        error: The class of the error.
        words: What its text must name.
        damage: Spoils a copy of a checkpoint and gives what to compile.
        recipe: The recipe.
        settings: Options on top of it.
    """

    error: type[QCompileError]
    words: tuple[str, ...]
    damage: Callable[[Path], Path] = lambda model: model
    recipe: str = "w4a8-rtn"
    settings: dict[str, str] = field(default_factory=dict)


def without(name: str) -> Callable[[Path], Path]:
    def damage(model: Path) -> Path:
        (model / name).unlink()
        return model

    return damage


def truncated(name: str, bytes_kept: int) -> Callable[[Path], Path]:
    def damage(model: Path) -> Path:
        os.truncate(model / name, bytes_kept)
        return model

    return damage


def replaced(name: str, content: str) -> Callable[[Path], Path]:
    def damage(model: Path) -> Path:
        (model / name).write_text(content)
        return model

    return damage


def edited(**changes: Any) -> Callable[[Path], Path]:
    def damage(model: Path) -> Path:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return model

    return damage


def with_tensor(name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Any:
    def damage(model: Path) -> Path:
        path = model / "model.safetensors"
        tensors = load_file(path)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = np.ascontiguousarray(changed)
        save_file(tensors, path, metadata={"format": "pt"})
        return model

    return damage


def one_nan(weight: np.ndarray) -> np.ndarray:
    weight[3, 2] = np.nan
    return weight


def one_infinity(weight: np.ndarray) -> np.ndarray:
    weight[0, -1] = -np.inf
    return weight


def gguf(content: bytes) -> Callable[[Path], Path]:
    def damage(model: Path) -> Path:
        path = model / "model.gguf"
        path.write_bytes(content)
        return path

    return damage


DOWN = "model.layers.1.mlp.down_proj.weight"

FAULTS = {
    "no such model": Fault(ModelError, ("absent",), lambda model: model / "absent"),
    "no such gguf": Fault(ModelError, ("absent.gguf",), lambda model: model / "absent.gguf"),
    "no weights": Fault(ModelError, ("safetensors",), without("model.safetensors")),
    "cut-off weights": Fault(
        ModelError, ("model.safetensors",), truncated("model.safetensors", 5000)
    ),
    "cut-off header": Fault(ModelError, ("model.safetensors",), truncated("model.safetensors", 9)),
    "empty weights": Fault(ModelError, ("model.safetensors",), truncated("model.safetensors", 0)),
    "no config": Fault(ModelError, ("config.json",), without("config.json")),
    "config that is no JSON": Fault(
        ModelError, ("config.json",), replaced("config.json", '{"model_type": "llama",')
    ),
    "config of another type": Fault(
        ModelError, ("config.json", "tie_word_embeddings"), edited(tie_word_embeddings=3)
    ),
    "config that no model can have": Fault(
        ModelError, ("heads", "5"), edited(num_attention_heads=5, head_dim=None)
    ),
    "config of more layers than there are tensors": Fault(
        ModelError,
        ("config.json", str(10**12), "num_hidden_layers"),
        edited(num_hidden_layers=10**12),
    ),
    "generation settings of another type": Fault(
        ModelError,
        ("generation settings", "eos_token_ids"),
        replaced("generation_config.json", '{"eos_token_id": "</s>"}'),
    ),
    "tokenizer that is none": Fault(
        ModelError,
        ("model.safetensors' cannot", "tokenizer.json"),
        replaced("tokenizer.json", "{}"),
    ),
    "generation settings that are no JSON": Fault(
        ModelError, ("generation_config.json",), replaced("generation_config.json", "{")
    ),
    "unknown architecture": Fault(
        ModelError, ("martian",), replaced("config.json", '{"model_type": "martian"}')
    ),
    "missing tensor": Fault(ModelError, (DOWN,), with_tensor(DOWN, lambda weight: None)),
    "tensor of another shape": Fault(
        ModelError, (DOWN, "[32, 40]"), with_tensor(DOWN, lambda weight: weight[:, :40])
    ),
    "a weight that is no number": Fault(ModelError, (DOWN,), with_tensor(DOWN, one_nan)),
    "an infinite weight": Fault(ModelError, (DOWN,), with_tensor(DOWN, one_infinity)),
    "an infinite weight that stays float": Fault(
        ModelError, (DOWN,), with_tensor(DOWN, one_infinity), recipe="float"
    ),
    "cut-off gguf": Fault(ModelError, ("model.gguf",), gguf(b"GGUF\3\0\0\0\1")),
    "a gguf that is none": Fault(ModelError, ("model.gguf",), gguf(b"not a model")),
    "unknown recipe": Fault(RecipeError, ("w4a8-rtm", "w4a8-rtn"), recipe="w4a8-rtm"),
    "unknown recipe key": Fault(
        RecipeError, ("gruop_size",), settings={"quantize_weights.gruop_size": "32"}
    ),
    "unknown format": Fault(RecipeError, ("99",), settings={"quantize_weights.format": "int99"}),
    "format that no kernel reads": Fault(
        TargetError,
        ("model.layers.[0-1].self_attn.q_proj", "int4-g24", "multiple of 16"),
        settings={"quantize_weights.format": "int4-g24"},
    ),
    "format that no kernel reads, for one layer": Fault(
        TargetError,
        ("model.layers.1.mlp.down_proj", "int4-g24", "multiple of 16"),
        settings={
            "quantize_weights.overrides": "[{match: 'model.layers.1.mlp.down_proj', "
            "format: int4-g24}]"
        },
    ),
    "two formats for one tensor": Fault(
        TargetError,
        ("model.embed_tokens.weight", "int4-g16", "int8-g64"),
        settings={"quantize_weights.embedding": "int4-g16"},
    ),
}


@pytest.fixture(params=FAULTS.values(), ids=FAULTS.keys())
def fault(request: pytest.FixtureRequest) -> Fault:
    result: Fault = request.param
    return result


def test_python_names_the_culprit_and_leaves_nothing(
    fault: Fault, broken: Path, tmp_path: Path
) -> None:
    model = fault.damage(broken)
    output = tmp_path / "outputs" / "new"
    overrides = {name: yaml.safe_load(value) for name, value in fault.settings.items()}
    with pytest.raises(fault.error) as raised:
        qc.compile(model, fault.recipe, output=output, overrides=overrides)
    for word in fault.words:
        assert word in str(raised.value)
    assert not output.exists()
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_command_line_says_it_once_and_keeps_an_old_output(
    fault: Fault, broken: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fault.damage(broken)
    output = Path(shutil.copytree(made, tmp_path / "outputs" / "old"))
    before = contents(output)
    settings = [f"--set={name}={value}" for name, value in fault.settings.items()]
    arguments = [str(model), "-r", fault.recipe, "-o", str(output), "--overwrite", *settings]
    assert main(["compile", *arguments, "--json"]) == fault.error.exit_code != 0
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    for word in fault.words:
        assert word in f"{error['message']} {error['remedy']}"
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert contents(output) == before
    assert [path.name for path in output.parent.iterdir()] == ["old"]


def test_artifact_is_no_model(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="compiled already"):
        qc.compile(made, output=tmp_path / "out")


def test_output_in_the_way_is_refused_before_the_model_is_read(made: Path) -> None:
    with pytest.raises(ArtifactError, match="holds an artifact already"):
        qc.compile("no/model", output=made)


# --- The real file, cut off ------------------------------------------------------------------


@pytest.mark.parametrize("kept", [100, 100_000, 50_000_000])
def test_gguf_that_ends_early_is_named(kept: int, smollm2_gguf: Path, tmp_path: Path) -> None:
    """In the header, in the vocabulary, in the weights."""
    path = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as file:
        path.write_bytes(file.read(kept))
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        qc.compile(path, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


# --- Texts that cannot be scored -------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"abc", "short"), (b"caf\xe9 " * 99, "UTF-8"), (None, "text.txt")],
    ids=["empty", "too short", "another encoding", "missing"],
)
def test_text_that_cannot_be_scored_is_named(
    content: bytes | None,
    words: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(DataError, match=words):
        qc.evaluate(made, text, window=64)
    capsys.readouterr()
    arguments = ["eval", str(made), "--text", str(text), "--window", "64", "--json"]
    assert main(arguments) == DataError.exit_code
    assert words in json.loads(capsys.readouterr().out)["error"]["message"]


# --- Artifacts that cannot be trusted --------------------------------------------------------


def flip_a_bit(directory: Path) -> None:
    path = directory / "model.onnx.data"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "one bit": (flip_a_bit, ("model.onnx.data", "sha256")),
    "cut-off weights": (
        lambda d: os.truncate(d / "model.onnx.data", 4096),
        ("model.onnx.data", "4096"),
    ),
    "no graph": (lambda d: (d / "model.onnx").unlink(), ("model.onnx",)),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), ("manifest.json",)),
    "newer schema": (edit_manifest(schema_version=99), ("99", "newer")),
    "newer kernels": (edit_manifest(kernel_layout_version=99), ("99", "layout")),
    "another target": (edit_manifest(target="toaster"), ("toaster",)),
    "a file outside": (
        edit_manifest(files={"../../etc/passwd": {"sha256": "0" * 64, "bytes": 1}}),
        ("passwd",),
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_artifact_is_refused_by_python_and_command_line(
    damage: Callable[[Path], None],
    words: tuple[str, ...],
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = Path(shutil.copytree(made, tmp_path / "artifact"))
    damage(directory)
    with pytest.raises(ArtifactError) as raised:
        qc.load(directory)
    capsys.readouterr()
    assert main(["run", str(directory), "hello", "--json"]) == ArtifactError.exit_code
    for shown in (str(raised.value), capsys.readouterr().out):
        for word in words:
            assert word in shown


# --- The machine -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of a given size; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount(size: int) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("room", [8 << 10, 64 << 10], ids=["at once", "while writing"])
def test_full_disk_is_named_with_what_is_needed(
    room: int, checkpoint: Path, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(room)
    needs = r"needs (at least|more than the) \d+ bytes"
    with pytest.raises(ArtifactError, match=rf"disk .* is full: .* {needs}") as raised:
        qc.compile(checkpoint, output=disk / "out")
    assert str(disk) in str(raised.value)
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", ["model.onnx.data", "tokenizer.json", "manifest.json"])
def test_disk_that_fills_up_leaves_the_old_output(
    name: str, checkpoint: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "old"))
    before = contents(output)
    fail_to_open(name, tmp_path, monkeypatch)
    with pytest.raises(ArtifactError, match=r"is full|No space left on device"):
        qc.compile(checkpoint, output=output, overwrite=True)
    assert contents(output) == before
    assert list(tmp_path.iterdir()) == [output]


def fail_to_open(name: str, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a disk full as soon as a file of that name is to be written to it."""
    original = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if self.name == name and "w" in mode and self.is_relative_to(disk):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return original(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    for method, mode in (("write_bytes", "wb"), ("write_text", "w")):
        monkeypatch.setattr(Path, method, _writing(method, mode, full))


def _writing(method: str, mode: str, open_file: Callable[..., Any]) -> Callable[..., Any]:
    original = getattr(Path, method)

    def write(self: Path, *arguments: Any, **options: Any) -> Any:
        open_file(self, mode).close()
        return original(self, *arguments, **options)

    return write


_SLOW_COMPILE = """
import sys, time
from qcompile.cli import main
from qcompile.passes.quantize.methods import Rtn
original = Rtn.quantize
def quantize(self, task):
    print("rounding", flush=True)
    time.sleep(30)
    return original(self, task)
Rtn.quantize = quantize
sys.exit(main(sys.argv[1:]))
"""


def test_interrupting_quantization_ends_at_once_and_keeps_the_old_output(
    checkpoint: Path, made: Path, tmp_path: Path
) -> None:
    output = Path(shutil.copytree(made, tmp_path / "old"))
    before = contents(output)
    arguments = ["compile", str(checkpoint), "-o", str(output), "--overwrite"]
    with subprocess.Popen(
        [sys.executable, "-c", _SLOW_COMPILE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "rounding\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=25)
    assert process.returncode == 130
    assert errors.strip().splitlines() == ["error: interrupted"]
    assert contents(output) == before
    assert list(tmp_path.iterdir()) == [output]
