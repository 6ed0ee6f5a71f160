"""Safetensors checkpoints: what is found, what is read, and every way in which they can be bad."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcompile.errors import ModelError, QCompileError
from qcompile.frontends.checkpoint import open_checkpoint
from qcompile.ir.weights import TensorSource, TensorSpec

INDEX = "model.safetensors.index.json"


def sample_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 4, generator=generator)
    return {
        "a.weight": values,
        "b.weight": values.half(),
        "c.weight": values.bfloat16(),
        "codes": (values * 10).to(torch.int8),
        "packed": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
        "words": torch.arange(4, dtype=torch.int32),
        "small_floats": values.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_shards(directory: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    weight_map = {}
    for file, tensors in shards.items():
        save_file(dict(tensors), directory / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_single_file_gives_every_tensor_in_its_own_dtype(tmp_path: Path) -> None:
    tensors = sample_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_checkpoint(tmp_path)
    assert isinstance(source, TensorSource)
    assert source.identity == str(tmp_path / "model.safetensors")
    assert source.specs() == {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read.double(), tensor.double())


def test_shards_of_an_index_are_one_source(tmp_path: Path) -> None:
    tensors = sample_tensors()
    first = {"a.weight": tensors["a.weight"]}
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    write_shards(tmp_path, {"model-1.safetensors": first, "model-2.safetensors": rest})
    source = open_checkpoint(tmp_path)
    assert source.identity == f"{tmp_path} (2 shards)"
    assert set(source.specs()) == set(tensors)
    assert torch.equal(source.read("a.weight"), tensors["a.weight"])
    assert torch.equal(source.read("codes"), tensors["codes"])


def test_only_other_safetensors_file_is_taken(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert set(open_checkpoint(tmp_path).specs()) == {"x"}


def test_model_file_wins_over_others(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"y": torch.ones(2)}, tmp_path / "model.fp16.safetensors")
    assert set(open_checkpoint(tmp_path).specs()) == {"x"}


def test_unknown_tensor_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="has no tensor 'y'"):
        open_checkpoint(tmp_path).read("y")


def test_file_removed_after_opening_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    source = open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot read tensor 'x' of .*model\.safetensors"):
        source.read("x")


def test_fingerprint_depends_on_values_and_not_on_the_directory(tmp_path: Path) -> None:
    def fingerprint(name: str, value: float) -> str:
        (tmp_path / name).mkdir()
        weight = torch.zeros(300, 300)
        weight[0, 0] = value
        save_file({"x": weight}, tmp_path / name / "model.safetensors")
        return open_checkpoint(tmp_path / name).fingerprint()

    assert fingerprint("one", 1.0) == fingerprint("two", 1.0)
    assert fingerprint("three", 1.0) != fingerprint("four", 2.0)


# --- nothing to open ---------------------------------------------------------------------------


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model directory '.*absent' does not exist"):
        open_checkpoint(tmp_path / "absent")


def test_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="is a file, not a directory"):
        open_checkpoint(tmp_path / "file")


def test_directory_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_and_never_loaded(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / name).write_bytes(f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(ModelError, match=r"never unpickled.*\n.*save_pretrained"):
        open_checkpoint(tmp_path)
    assert not canary.exists()


def test_several_files_without_index_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"no index: 'a\.safetensors', 'b\.safetensors'"):
        open_checkpoint(tmp_path)


def test_adapter_is_refused(tmp_path: Path) -> None:
    save_file({"lora_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="LoRA adapter"):
        open_checkpoint(tmp_path)


# --- bad indices -------------------------------------------------------------------------------


def test_missing_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"one.safetensors": {"x": torch.ones(1)}})
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ModelError, match=r"'one\.safetensors' is named in"):
        open_checkpoint(tmp_path)


def test_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"x": "one.safetensors", "y": "one.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names tensor 'y'"):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards_is_named(tmp_path: Path) -> None:
    shard = {"x": torch.ones(1)}
    write_shards(tmp_path, {"one.safetensors": shard, "two.safetensors": {"y": torch.ones(1)}})
    save_file({**shard, "y": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ModelError, match=r"tensor 'x' is in 'one\.safetensors' and in 'two"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../one.safetensors", "/etc/passwd", "a\\..\\..\\x", "C:x", "", 3]
)
def test_shard_outside_of_the_directory_is_refused(tmp_path: Path, shard: object) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ModelError, match="no file beside it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_malformed_index_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"index\.json' is damaged"):
        open_checkpoint(tmp_path)


def test_two_indices_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="several safetensors indices"):
        open_checkpoint(tmp_path)


# --- bad files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.02, 0.3, 0.6, 0.9, 0.999])
def test_truncated_file_is_called_so(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(64, 64), "y": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(ModelError, match=r"model\.safetensors' is truncated"):
        open_checkpoint(tmp_path)


def test_truncated_data_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(4), "y": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"tensor 'y' ends at byte 272 of the data, .* has 268"):
        open_checkpoint(tmp_path)


def test_header_beyond_the_format_is_refused_without_allocating(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="allows 100 MB"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "no valid JSON"),
        (b"\xff\xfe", b"", "no valid JSON"),
        (b"[" * 100_000, b"", "no valid JSON"),
        (b"9" * 5000, b"", "no valid JSON"),
        (b"[]", b"", "no JSON object"),
        ({"x": 3}, b"", "description of tensor 'x' is no object"),
        ({"x": entry(shape=[-2])}, bytes(8), "tensor 'x' has no valid shape"),
        ({"x": entry(shape=[True])}, bytes(8), "tensor 'x' has no valid shape"),
        ({"x": entry(shape="2")}, bytes(8), "tensor 'x' has no valid shape"),
        ({"x": {**entry(), "data_offsets": [0]}}, bytes(8), "no valid data_offsets"),
        ({"x": {**entry(), "data_offsets": [0, 8.0]}}, bytes(8), "no valid data_offsets"),
        ({"x": entry(0, 4)}, bytes(4), "needs 8 bytes, its data_offsets .* give 4"),
        ({"x": entry(8, 0)}, bytes(8), "needs 8 bytes"),
        ({"x": entry(shape=[1 << 40, 1 << 40])}, bytes(8), "needs 4835703278458516698824704"),
        ({"x": entry(dtype="F7")}, bytes(8), "dtype 'F7', which cannot be read"),
        ({"x": entry(dtype=None)}, bytes(8), "dtype None, which cannot be read"),
        ({"x": entry(4, 12)}, bytes(12), "data of tensor 'x' has a gap"),
        ({"x": entry(), "y": entry(4, 12)}, bytes(12), "'y' overlaps the tensor before it"),
        ({"x": entry()}, bytes(9), "1 bytes follow its last tensor"),
        ({"x": entry(1 << 50, (1 << 50) + 8)}, bytes(8), "data of tensor 'x' has a gap"),
        (b'{"x": {}, "x": {}}', b"", "'x' stands in its header twice"),
        (b'{"\\ud800": {}}', b"", "no valid tensor name"),
    ],
)
def test_damaged_header_says_what_is_wrong(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "model.safetensors" in caught.value.message


def flip_byte(raw: bytearray, rng: random.Random) -> None:
    raw[rng.randrange(len(raw))] = rng.randrange(256)


def flip_digit(raw: bytearray, rng: random.Random) -> None:
    digits = [index for index, byte in enumerate(raw) if chr(byte).isdigit()]
    raw[rng.choice(digits)] = ord(rng.choice("0123456789-e."))


def cut_out(raw: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(raw))
    del raw[start : start + rng.randrange(1, 20)]


@pytest.mark.parametrize("mutate", [flip_byte, flip_digit, cut_out])
def test_mutated_header_is_read_or_refused(
    tmp_path: Path, mutate: Callable[[bytearray, random.Random], None]
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(sample_tensors(), path)
    pristine = path.read_bytes()
    end = 8 + int.from_bytes(pristine[:8], "little")
    refused = 0
    for seed in range(50):
        header = bytearray(pristine[:end])
        mutate(header, random.Random(seed))
        path.write_bytes(bytes(header) + pristine[end:])
        try:
            source = open_checkpoint(tmp_path)
            for name in source.specs():
                source.read(name)
        except QCompileError:
            refused += 1
    assert refused > 10  # most mutations matter, and none got past as another kind of exception
