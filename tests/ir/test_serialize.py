"""Saved programs: what is written comes back, and what should not be read is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from qcompile.errors import ArtifactError, TargetError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.serialize import (
    PROGRAM_NAME,
    WEIGHTS_NAME,
    load_program,
    predict_program_files,
    save_program,
)
from qcompile.ir.types import Fact, Provenance
from qcompile.ir.weights import TensorSpec
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

aten = torch.ops.aten


class Net(nn.Module):
    """Several results, dtypes, sizes that are computed, an operator with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.register_buffer("steps", torch.arange(4))

    def forward(self, x: Tensor, other: dict[str, Tensor]) -> dict[str, Any]:
        h = self.up(x).masked_fill(other["mask"], float("-inf"))
        left, right = torch.chunk(h, 2, dim=-1)
        flat = (left * right.to(torch.float16)).reshape(x.shape[0] * 2, -1)
        return {"flat": flat, "pair": [torch.softmax(h, -1), self.steps + x.shape[0]]}


@pytest.fixture(scope="module")
def captured() -> Program:
    torch.manual_seed(0)
    inputs = (torch.randn(3, 6), {"mask": torch.rand(3, 8) > 0.5})
    return canonicalize(capture_module(Net(), inputs))


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def reload(program: Program, directory: Path) -> Program:
    save_program(program, directory)
    return load_program(directory)


def test_program_comes_back_as_it_was(program: Program, tmp_path: Path) -> None:
    program.notes = ("a note", "é")
    program.provenance = Provenance(
        name="net",
        source="here",
        architecture="Net",
        fingerprint="f",
        stored_bytes=7,
        config={"size": 3, "limit": float("inf")},
        assets={"tokenizer.json": b"\x00{}"},
    )
    loaded = reload(program, tmp_path)
    loaded.verify(shapes=True)
    assert loaded.text() == program.text()
    assert loaded.facts == program.facts == {Fact.CANONICAL}
    assert loaded.notes == program.notes
    assert loaded.signature == program.signature
    expected = replace(program.provenance, config={"size": 3, "limit": "Infinity"})
    assert loaded.provenance == expected


@pytest.mark.parametrize("batch", [1, 5])
def test_loaded_program_computes_the_same(program: Program, tmp_path: Path, batch: int) -> None:
    loaded = reload(program, tmp_path)
    inputs = (torch.randn(batch, 6), {"mask": torch.rand(batch, 8) > 0.5})
    expected, found = program(*inputs), loaded(*inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found["pair"][1].tolist() == [batch, batch + 1, batch + 2, batch + 3]


def test_quantized_program_comes_back_as_it_was(program: Program, tmp_path: Path) -> None:
    quantized = run_passes(program, [QuantizeWeights("int4-g4-asym"), QuantizeActivations()])
    loaded = reload(quantized, tmp_path)
    assert "qc.quantize(" in loaded.text()
    assert loaded.text() == quantized.text()
    inputs = (torch.randn(2, 6), {"mask": torch.rand(2, 8) > 0.5})
    torch.testing.assert_close(loaded(*inputs), quantized(*inputs), rtol=0, atol=0)


def test_loaded_program_can_be_saved_again_to_the_same_bytes(
    program: Program, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    loaded = reload(program, first)
    save_program(loaded, second)
    for name in (PROGRAM_NAME, WEIGHTS_NAME):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_loaded_program_can_be_edited(program: Program, tmp_path: Path) -> None:
    loaded = reload(program, tmp_path)
    editor = Editor(loaded)
    relu = next(loaded.calls(aten._softmax.default, aten.softmax.int))
    with editor.after(relu):
        new = editor.call(aten.mul.Tensor, relu, 2.0)
    relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    loaded.verify(shapes=True)


def test_predicted_sizes_are_those_of_the_files(program: Program, tmp_path: Path) -> None:
    predicted = predict_program_files(program)
    stored = save_program(program, tmp_path)
    assert {name: (tmp_path / name).stat().st_size for name in predicted} == predicted
    assert stored == {"up.weight": 192, "up.bias": 32, "steps": 32}


def test_weight_that_only_moves_elements_is_stored_as_narrow_as_its_source(
    program: Program, tmp_path: Path
) -> None:
    weights = program.weights
    values = torch.randn(6, 8).to(torch.bfloat16)
    weights.put("narrow", values)
    spec = TensorSpec((8, 6), torch.float32)
    weights.derive("up.weight", ("narrow",), lambda w: w.t(), spec, exact=True, label="t")
    weights.derive(
        "up.bias",
        ("up.bias",),
        lambda b: b * 3,
        TensorSpec((8,), torch.float32),
        exact=False,
        label="scale",
    )
    program.tidy()
    loaded = reload(program, tmp_path)
    with safe_open(str(tmp_path / WEIGHTS_NAME), framework="pt") as file:
        assert file.get_tensor("up.weight").dtype == torch.bfloat16
        assert file.get_tensor("up.bias").dtype == torch.float32
    assert loaded.weights.spec("up.weight") == spec
    assert torch.equal(loaded.weights.materialize("up.weight"), values.t().float())


def test_stored_tensors_are_aligned_to_their_elements(tmp_path: Path, program: Program) -> None:
    program.weights.put("odd", torch.zeros(3, dtype=torch.uint8))
    save_program(program, tmp_path)
    raw = (tmp_path / WEIGHTS_NAME).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 64 == 0
    assert header["odd"]["data_offsets"][1] == len(raw) - 8 - length
    sizes = {"I64": 8, "F32": 4, "U8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % sizes[entry["dtype"]] == 0


def test_call_outside_of_the_allow_list_is_not_saved(program: Program, tmp_path: Path) -> None:
    node = next(program.calls(aten.linear.default))
    node.target = aten.from_file.default
    with pytest.raises(TargetError, match=rf"node '{node.name}' .* may not call aten.from_file"):
        save_program(program, tmp_path)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    save_program(captured, directory)
    return directory


def damaged(saved: Path, directory: Path, damage: Callable[[Any], Any]) -> Path:
    """A copy of the saved program whose document is changed."""
    document = json.loads((saved / PROGRAM_NAME).read_text())
    changed = damage(document)
    (directory / PROGRAM_NAME).write_text(json.dumps(document if changed is None else changed))
    (directory / WEIGHTS_NAME).write_bytes((saved / WEIGHTS_NAME).read_bytes())
    return directory


def call(document: dict[str, Any], target: str = "aten.linear.default") -> dict[str, Any]:
    """The first call of an operator."""
    found: dict[str, Any] = next(n for n in document["nodes"] if n.get("target") == target)
    return found


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: d.update(extra=1), "extra: Extra inputs"),
        (lambda d: d.update(schema_version=2), "newer qcompile"),
        (lambda d: d.update(format="other"), "format: "),
        (lambda d: d.pop("results"), "results: Field required"),
        (lambda d: [], "no program"),
        (lambda d: d["facts"].append("wise"), "facts.1"),
        (lambda d: call(d).update(unknown=1), "unknown"),
        (lambda d: call(d).update(target="aten.from_file.default"), "aten.from_file.default"),
        (lambda d: call(d).update(target="aten.add_.Tensor"), "aten.add_.Tensor"),
        (lambda d: call(d).update(target="aten.__class__.mro"), "aten.__class__.mro"),
        (lambda d: call(d).update(target="prims.add.default"), "prims.add.default"),
        (lambda d: call(d).update(target="qc.nothing.default"), "qc.nothing.default"),
        (lambda d: call(d).update(target="py.eval"), "py.eval"),
        (lambda d: call(d)["args"].append({"node": 99}), "'node': 99"),
        (lambda d: call(d)["args"].append({"node": True}), "'node': True"),
        (lambda d: call(d)["args"].append({"dtype": "object"}), "'dtype': 'object'"),
        (lambda d: call(d)["args"].append({"a": 1, "b": 2}), "one key"),
        (lambda d: call(d).update(value={"tensor": ["float32", [-1], [1]]}), "no size"),
        (lambda d: call(d).update(value={"tensor": ["float32", [2.5], [1]]}), "no size"),
        (lambda d: call(d).update(value={"tensor": ["float32", [2], []]}), "no tensor"),
        (lambda d: call(d).update(value={"tensor": ["text", [2], [1]]}), "no tensor"),
        (lambda d: call(d).update(value={"tensor": ["uint8", ["t"], [1]]}), "'t' is not declared"),
        (lambda d: call(d).update(value={"scalar": "open('x')"}), r"open\('x'\)"),
        (lambda d: call(d).update(value={"scalar": "9**9**9"}), r"9\*\*9"),
        (lambda d: call(d).update(value={"scalar": "1//0"}), "1//0"),
        (lambda d: d.update(symbols={"s0": -4}), "out of range"),
        (lambda d: d["nodes"][1].update(weight="none"), "no weight 'none'"),
        (lambda d: d.update(results=[999]), "a result is none"),
        (lambda d: d["results"].pop(), "3 outputs, the graph has 2"),
        (lambda d: d["weights"].pop("steps"), "'steps' is not both"),
        (lambda d: d["weights"]["up.bias"].update(shape=[9]), "'up.bias' is torch.float32"),
        (lambda d: d["weights"]["up.bias"].update(dtype="float16"), "'up.bias' is torch.float32"),
        (lambda d: d["weights"]["up.bias"].update(dtype="text"), "unknown dtype 'text'"),
        (lambda d: d["provenance"].update(assets=["../x"]), "leaves its folder"),
        (lambda d: d["provenance"].update(assets=["x"]), "x cannot be read"),
        (lambda d: d["signature"].update(input_tree={"set": []}), "structure of arguments"),
    ],
)
def test_damaged_document_is_refused(
    saved: Path, tmp_path: Path, damage: Callable[[Any], Any], named: str
) -> None:
    def apply(document: Any) -> Any:
        result = damage(document)
        return result if isinstance(result, list) and not result else None

    with pytest.raises(ArtifactError, match=named):
        load_program(damaged(saved, tmp_path, apply))


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000, '{"nodes": NaN}'])
def test_text_that_is_no_document_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / PROGRAM_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=PROGRAM_NAME):
        load_program(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 40, -1])
def test_cut_off_weights_are_refused(saved: Path, tmp_path: Path, length: int) -> None:
    (tmp_path / PROGRAM_NAME).write_bytes((saved / PROGRAM_NAME).read_bytes())
    (tmp_path / WEIGHTS_NAME).write_bytes((saved / WEIGHTS_NAME).read_bytes()[:length])
    with pytest.raises(ArtifactError, match=WEIGHTS_NAME):
        load_program(tmp_path)


def test_missing_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=PROGRAM_NAME):
        load_program(tmp_path)
    (tmp_path / PROGRAM_NAME).write_bytes((saved / PROGRAM_NAME).read_bytes())
    with pytest.raises(ArtifactError, match=WEIGHTS_NAME):
        load_program(tmp_path)
