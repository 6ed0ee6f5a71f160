"""Layers over split weights on the targets: the program's numbers, at the size that it says."""

import numpy as np
import pytest
import torch

import qcompile as qc
from qcompile.backends.registry import get_target
from qcompile.formats.split import side_by_side
from qcompile.legality import preflight
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.lower.split_linears import SplitLinears
from qcompile.passes.quantize.bits import count_bits
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

IDS = np.array([[1, 9, 200, 31, 7, 55, 120, 3]])

FORMATS = {
    "outliers": "int3-g16-asym+5%fp16",
    "mixed": "int2-g16-asym+1x(-1,1)-g16+1xint3-g16-asym",
}


def recipe(format):
    weights = {"format": format, "embedding": "int8-g16", "lm_head": "int8-g16"}
    return {"name": "split", "steps": [{"quantize_weights": weights}]}


@pytest.fixture(scope="module")
def program(tiny_checkpoint):
    """A float model whose linears have 64 and 80 inputs."""
    return qc.capture(tiny_checkpoint("llama", hidden_size=64, intermediate_size=80, head_dim=16))


def quantized(program, format):
    return PassManager(recipe_phases(load_recipe(recipe(format)))).run(program)[0]


@pytest.mark.parametrize("target", ["cpu", "onnx"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_artifact_computes_what_the_program_does_at_the_foretold_size(
    program, tmp_path, target, format
):
    artifact = qc.compile(
        program, recipe(format), target=target, output=tmp_path / "out", check="off"
    )
    expected = quantized(program, format)(torch.from_numpy(IDS)).logits.numpy()
    # Float32 sums in another order, over two layers.
    np.testing.assert_allclose(artifact.forward(IDS), expected, rtol=1e-4, atol=1e-4)
    foretold = preflight(program, recipe(format), target).estimate.files
    assert foretold == {n: (tmp_path / "out" / n).stat().st_size for n in foretold}
    assert len(list(artifact.generate("ab", max_new_tokens=4, stream=True))) > 0


def test_what_is_stored_is_what_is_counted(program):
    """Codes, scales, floats and columns, tensor by tensor."""
    before = quantized(program, FORMATS["outliers"])
    counted = count_bits(before)
    after = qc.run_passes(before, [SplitLinears()])
    names = {str(node.target) for node in after.parameters()}
    for tensor in counted.tensors:
        if not tensor.quantized or f"{tensor.name}.codes" in names:
            continue
        own = {name: after.weights.spec(name) for name in names if name.startswith(tensor.name)}
        widths = {"codes": 3 / 8, "zero_point": 3 / 8}
        stored = sum(s.bytes * widths.get(n.rsplit(".", 1)[1], 1) for n, s in own.items())
        assert stored * 8 == tensor.bits
        assert not any(name.endswith("places") for name in own)


@pytest.mark.parametrize("target", ["cpu", "onnx", "cuda"])
def test_embedding_is_refused_in_preflight(program, target):
    options = {"format": "int4-g16", "embedding": "int4-g16+5%fp16"}
    found = preflight(program, {"name": "x", "steps": [{"quantize_weights": options}]}, target)
    (finding,) = found.findings
    assert "only weights of linear layers are taken apart" in finding.reason
    assert finding.remedy == "use int4-g16, or leave it float"


@pytest.mark.parametrize("target", ["cpu", "onnx"])
def test_floats_beside_codes_run_at_the_foretold_size(program, tmp_path, target):
    format = "int3-g16-asym+1xint4-g16-asym/5%fp16"
    artifact = qc.compile(
        program, recipe(format), target=target, output=tmp_path / "out", check="off"
    )
    expected = quantized(program, format)(torch.from_numpy(IDS)).logits.numpy()
    # Float32 sums in another order, over two layers.
    np.testing.assert_allclose(artifact.forward(IDS), expected, rtol=1e-4, atol=1e-4)
    foretold = preflight(program, recipe(format), target).estimate.files
    assert foretold == {n: (tmp_path / "out" / n).stat().st_size for n in foretold}


def test_floats_beside_codes_are_refused_where_no_kernel_adds_them(program):
    found = preflight(program, recipe("int4-g16/1%fp16"), "cuda").findings
    reasons = {finding.reason for finding in found if "fp16" in finding.reason}
    assert reasons == {"int4-g16/1%fp16: the target has no kernel for floats beside codes"}


def test_parts_are_layers_of_their_own_on_cuda():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 96, generator=generator)
    layer = qc.capture(torch.nn.Sequential(torch.nn.Linear(96, 24)), x)
    before = quantized(layer, FORMATS["outliers"])
    after = get_target("cuda:rounding=none").lower(before, Context())
    assert all(side_by_side(node) is None for node in after.calls())
    # Float32 sums of 96 products in another order.
    torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-5)
