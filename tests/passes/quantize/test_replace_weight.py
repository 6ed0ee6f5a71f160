import pytest
import torch

from qcompile.formats import parse_format, stored_weight
from qcompile.ir.interpreter import Interpreter
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.layers import LINEAR, layer_weights
from qcompile.passes.quantize.replace_weight import replace_weight

FORMATS = ("int4-g16", "int3-g16-asym-bf16", "nf4-g16", "fp8", "mxfp4", "nvfp4", "nf4-g16-dq")


def replaced(program, name):
    """The program with its first weight in a format, and what stands for it."""
    after, format = program.copy(), parse_format(name)
    weight = layer_weights(after)[0][0]
    quantized = format.encode(after.weights.materialize(weight.name))
    return after, quantized, replace_weight(after, weight, quantized)


def calls(program):
    """The calls of a program as its text has them."""
    return [line.strip() for line in program.text().splitlines() if " = " in line]


def test_lookup_format_becomes_one_lookup(linear):
    after, _, _ = replaced(linear, "nf4-g16")
    assert calls(after) == [
        "%0: f32[4, 32] = qc.lookup(@weight.codes, @weight.scale, nf4, 16)",
        "%1: f32[s0, 4] = aten.linear(%input_1, %0, @bias)",
    ]


def test_coded_scales_are_looked_up_first(linear):
    after, _, _ = replaced(linear, "nvfp4")
    assert calls(after)[:2] == [
        "%0: f32[4, 2] = qc.lookup(@weight.scale, @weight.outer_scale, e4m3, 0)",
        "%1: f32[4, 32] = qc.lookup(@weight.codes, %0, e2m1, 16)",
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_program_computes_with_what_the_format_decodes(linear, name):
    after, quantized, _ = replaced(linear, name)
    after.verify()
    x = torch.randn(3, 32)
    bias = after.weights.materialize("bias")
    expected = torch.nn.functional.linear(x, quantized.format.decode(quantized), bias)
    # The same float32 operator on the same numbers.
    assert torch.equal(Interpreter(after).run(x)[0], expected)


@pytest.mark.parametrize("name", FORMATS)
def test_float64_interpreter_decodes_to_the_same_numbers(linear, name):
    after, quantized, value = replaced(linear, name)
    seen = {}
    Interpreter(
        after, dtype=torch.float64, hook=lambda node, value: seen.setdefault(node, value)
    ).run(torch.randn(3, 32))
    assert torch.equal(seen[value], quantized.format.decode(quantized).double())


@pytest.mark.parametrize("name", FORMATS)
def test_stored_weight_is_found_again(linear, name):
    after, quantized, value = replaced(linear, name)
    (layer,) = after.calls(LINEAR)
    found = stored_weight(layer.args[1])
    assert found is not None
    assert found.value is value
    assert found.name == "weight"
    assert found.format == quantized.format
    assert found.shape == (4, 32)
    assert {part: f"weight.{part}" for part in quantized.tensors} == {
        part: str(node.target) for part, node in found.tensors.items()
    }


def test_other_nodes_are_no_stored_weights(linear):
    (layer,) = linear.calls(LINEAR)
    assert [stored_weight(operand) for operand in (*layer.args, layer, 3)] == [None] * 5


@pytest.mark.parametrize("name", FORMATS)
def test_bits_of_the_program_are_those_of_the_format(linear, name):
    after, quantized, _ = replaced(linear, name)
    (stored,) = [tensor for tensor in count_bits(after).tensors if tensor.quantized]
    assert stored.bits == quantized.format.stored_bits((4, 32))
    assert (stored.name, stored.format) == ("weight", name)
