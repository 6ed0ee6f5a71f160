"""Weights of routed experts: stored per expert, row and group, chosen expert by expert."""

import pytest
import torch
from tests.passes.quantize.moe import experts

from qcompile.errors import ModelError
from qcompile.formats import QuantizedWeight, parse_format, stored_weight
from qcompile.ir import dialect
from qcompile.passes.infra import PassManager, run_passes
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.layers import Part, layer_weights
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


def decoded(program, name):
    """What stands for a weight, as float32."""
    call = next(program.calls(dialect.experts))
    stored = next(w for w in map(stored_weight, call.args) if w is not None and w.name == name)
    tensors = {
        part: program.weights.materialize(str(n.target)) for part, n in stored.tensors.items()
    }
    return stored.format.decode(QuantizedWeight(stored.format, stored.shape, tensors))


def test_experts_are_found_and_their_biases_stay_float():
    weights, excluded = layer_weights(experts(bias=True))
    parts = {weight.name: weight.parts for weight in weights}
    assert parts["up"] == parts["down"] == {Part.EXPERTS}
    assert excluded == dict.fromkeys(("up_bias", "down_bias"), "biases of experts stay float")


@pytest.mark.parametrize(
    "format", ["int4-g16", "int3-g16-asym", "int8", "nf4-g16-dq", "nvfp4", "mxfp4", "ternary"]
)
def test_rounding_treats_each_expert_as_a_matrix_of_its_own(format):
    program = experts()
    after = run_passes(program, [QuantizeWeights(format)])
    after.verify(shapes=True)
    kind = parse_format(format)
    for name in ("up", "down"):
        weight = program.weights.materialize(name)
        expected = torch.stack([kind.decode(kind.encode(matrix)) for matrix in weight])
        assert torch.equal(decoded(after, name), expected)


@pytest.mark.parametrize("format", ["int4-g16", "int3-g20-asym", "nf4-g16-dq", "nvfp4"])
def test_quantized_program_computes_with_the_decoded_weights(format):
    program = experts(bias=True)
    after = run_passes(program, [QuantizeWeights(format, ignore=["router*", "shared*"])])
    reference = program.copy()
    for name in ("up", "down"):
        reference.weights.put(name, decoded(after, name))
    x = torch.randn(7, 32)
    torch.testing.assert_close(after(x), reference(x), rtol=0, atol=0)


def test_bits_of_experts_are_counted_per_row_and_group():
    after = run_passes(experts(), [QuantizeWeights("int4-g16")])
    up = next(t for t in count_bits(after).tensors if t.name == "up")
    assert (up.code_bits, up.scale_bits) == (4 * 48 * 32 * 4, 4 * 48 * 2 * 16)


def test_record_names_the_experts_that_a_note_is_about():
    program = experts()
    _, records = PassManager([QuantizeWeights("int4-g16", method="hqq")]).run(program)
    record = next(d for d in records[0].result.details if d["weight"] == "up")
    assert record["parts"] == ["experts"]
    assert record["shape"] == [4, 48, 32]
    assert 0 < record["relative_error"] < 0.1


def test_weight_that_is_not_finite_names_the_expert():
    program = experts()
    broken = program.weights.materialize("up").clone()
    broken[2, 1, 1] = float("nan")
    program.weights.put("up", broken)
    with pytest.raises(ModelError, match=r"weight 'up\[2\]' contains NaN"):
        run_passes(program, [QuantizeWeights("int4-g16")])
