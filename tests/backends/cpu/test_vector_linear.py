"""Weights of vector codebooks on the targets: turned inputs, one node per layer, true size."""

from __future__ import annotations

import pytest
import torch

from qcompile.backends.cpu.lower import lower_phase
from qcompile.backends.cpu.vector_linear import vector_linear
from qcompile.compiler import compile
from qcompile.ir import dialect
from qcompile.legality import preflight
from qcompile.passes.infra import PassManager
from qcompile.passes.lower.turn_inputs import TurnInputs
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

RECIPE = load_recipe(
    {"steps": [{"quantize_weights": {"format": "higgs2x64-g32", "lm_head": "int8"}}]}
)


def quantize(program):
    return PassManager(recipe_phases(RECIPE)).run(program)[0]


def logits(program, ids):
    return program(ids).logits


def test_inputs_are_turned_in_place_of_weights(program) -> None:
    before = quantize(program("llama"))
    after, _ = PassManager([TurnInputs()]).run(before)
    assert all(node.args[4] == 0 for node in after.calls(dialect.lookup_vectors))
    linears = len(list(after.calls(dialect.lookup_vectors)))
    # Query, key and value share an input, gate and up another one: 4 of 7 in each layer.
    assert len(list(after.calls(dialect.transform))) == linears * 4 // 7
    ids = torch.arange(12).reshape(2, 6)
    torch.testing.assert_close(logits(after, ids), logits(before, ids), rtol=0, atol=1e-4)


def test_layers_become_one_node_over_a_packed_weight(program) -> None:
    before = quantize(program("llama"))
    after, _ = PassManager([lower_phase()]).run(before)
    assert not list(after.calls(dialect.lookup_vectors))
    linears = list(after.calls(vector_linear))
    assert len(linears) == len(list(before.calls(dialect.lookup_vectors)))
    stored = sum(after.weights.spec(str(node.args[1].target)).bytes for node in linears)
    counted = sum(t.bits for t in count_bits(before).tensors if t.format.startswith("higgs")) / 8
    rows = sum(node.args[3] for node in linears)
    assert counted <= stored <= counted + rows + len(linears)


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_artifacts_compute_what_the_program_does(program, tmp_path, target) -> None:
    artifact = compile(
        program("llama"), recipe=RECIPE, target=target, output=tmp_path / "a", threads=1
    )
    ids = torch.arange(12).reshape(2, 6)
    expected = logits(quantize(program("llama")), ids)
    found = torch.from_numpy(artifact.forward(ids.numpy()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert artifact.report is not None


def test_size_is_predicted_to_the_byte(program, tmp_path) -> None:
    predicted = preflight(program("llama"), RECIPE, "cpu").estimate
    assert predicted is not None
    artifact = compile(program("llama"), recipe=RECIPE, output=tmp_path / "a", threads=1)
    sizes = {name: file.bytes for name, file in artifact.manifest.files.items()}
    for name, size in predicted.to_dict()["files"].items():
        assert sizes[name] == size, name


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_tables_of_rows_are_refused_before_any_work(program, target) -> None:
    recipe = load_recipe({"steps": [{"quantize_weights": {"format": "higgs2x64-g32"}}]})
    found = preflight(program("llama-tied"), recipe, target)
    (finding,) = found.findings
    assert "embed_tokens" in finding.layer
    assert finding.remedy is not None
    assert "use int3-g32" in finding.remedy
