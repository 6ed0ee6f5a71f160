"""Weights beside the model: aligned, each once, one in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx as onnx_package
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.external_data import write_model
from qcompile.errors import ArtifactError
from qcompile.ir.program import Program


class Model(nn.Module):
    """A weight of more than a mebibyte, one of some kibibytes, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 64)
        self.up = nn.Linear(64, 5000)
        self.down = nn.Linear(5000, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(self.embed(ids)))))


@pytest.fixture
def program(onnx: Any) -> Program:
    captured: Program = onnx.capture(Model(), torch.randint(0, 30, (2, 5)))
    return captured


def external(path: Path) -> dict[str, dict[str, str]]:
    model = onnx_package.load(path, load_external_data=False)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }


def test_written_model_runs_from_its_files(onnx: Any, program: Program, tmp_path: Path) -> None:
    write_model(onnx.emit(program), program.weights, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    ids = torch.randint(0, 30, (3, 2))
    (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    expected = Model()(ids).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_large_tensors_begin_on_pages_and_others_on_lines(
    onnx: Any, program: Program, tmp_path: Path
) -> None:
    stored = write_model(onnx.emit(program), program.weights, tmp_path)
    entries = external(tmp_path / "model.onnx")
    assert set(entries) == {
        "embed.weight",
        "up.weight.transposed",
        "up.bias",
        "down.weight.transposed",
    }
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: int(item[1]["offset"])):
        offset, length = int(entry["offset"]), int(entry["length"])
        assert entry["location"] == "model.onnx.data"
        assert offset % (4096 if length > 1 << 20 else 64) == 0
        assert offset >= end
        assert length == stored[name]
        end = offset + length
    assert (tmp_path / "model.onnx.data").stat().st_size == end


def test_weights_are_transposed_on_the_way(onnx: Any, program: Program, tmp_path: Path) -> None:
    write_model(onnx.emit(program), program.weights, tmp_path)
    entry = external(tmp_path / "model.onnx")["up.weight.transposed"]
    data = (tmp_path / "model.onnx.data").read_bytes()[int(entry["offset"]) :]
    found = np.frombuffer(data[: int(entry["length"])], np.float32).reshape(64, 5000)
    assert (found == Model().up.weight.detach().numpy().T).all()


def test_each_weight_is_read_once(
    onnx: Any, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    materialize = type(program.weights).materialize

    def record(store: Any, name: str, dtype: torch.dtype | None = None) -> Tensor:
        read.append(name)
        return materialize(store, name, dtype)

    monkeypatch.setattr(type(program.weights), "materialize", record)
    graph = onnx.emit(program)
    assert read == []
    write_model(graph, program.weights, tmp_path)
    assert sorted(read) == sorted(weight.weight for weight in graph.weights.values())


def test_small_model_has_no_data_file(onnx: Any, tmp_path: Path) -> None:
    small = onnx.capture(nn.Linear(3, 2), torch.randn(4, 3))
    assert write_model(onnx.emit(small), small.weights, tmp_path) == {
        "weight.transposed": 24,
        "bias": 8,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_bfloat16_and_scalar_weights_keep_their_bits(onnx: Any, tmp_path: Path) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("one", torch.tensor(1.5))
            self.register_buffer("many", torch.randn(700))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.one + self.many

    program = onnx.capture(Narrow(), torch.randn(4, 700))
    for name in ("one", "many"):
        narrow = program.weights.materialize(name).bfloat16()
        program.weights.put(name, narrow)
        for node in program.parameters():
            if node.target == name:
                node.meta["val"] = node.meta["val"].bfloat16()
    write_model(onnx.emit(program), program.weights, tmp_path)
    model = onnx_package.load(tmp_path / "model.onnx")
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    assert found["many"].data_type == onnx_package.TensorProto.BFLOAT16
    expected = program.weights.materialize("many").view(torch.int16).numpy().tobytes()
    assert found["many"].raw_data == expected
    assert list(found["one"].dims) == []


def test_directory_that_is_missing_is_a_clear_error(
    onnx: Any, program: Program, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        write_model(onnx.emit(program), program.weights, tmp_path / "missing")
