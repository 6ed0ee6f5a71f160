"""Blocks by input and range, floats by size, and one sweep over all of them."""

import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.formats import parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.mixed import Mixed

FORMAT = "int2-g16-asym+2xint4-g16-asym/2%fp16"
PAPER = "(-1.5,-0.5,0.5,1.5)-g16-dq+10%nf4-g16-dq/0.4%fp16"


def problem(seed=0):
    """8 blocks of 16 columns: the inputs of block 2 are large, the weights of block 5 wide."""
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(4.0).sample((16, 128))
    weight[:, 5 * 16 : 6 * 16] *= 5
    x = torch.randn(600, 128) @ (torch.eye(128) + 0.05 * torch.randn(128, 128))
    x[:, 2 * 16 : 3 * 16] *= 5
    hessian = Hessian()
    hessian.update(x)
    return weight, Inputs(hessian)


def task(weight, inputs, format):
    return Task("w", weight, parse_format(format), "mse", inputs)


def error(inputs, weight, quantized):
    return inputs.relative_error(weight, quantized.format.decode(quantized))


def test_blocks_of_large_inputs_and_of_wide_ranges_get_more_bits():
    weight, inputs = problem()
    found = Mixed().quantize(task(weight, inputs, FORMAT)).weight
    columns = torch.argsort(found.tensors["base.places"])
    assert columns[-32:].tolist() == [*range(32, 48), *range(80, 96)]


def test_floats_stand_only_beside_narrow_codes():
    weight, inputs = problem()
    found = Mixed().quantize(task(weight, inputs, FORMAT)).weight
    index = found.tensors["index"].long()
    assert not {*range(32, 48), *range(80, 96)} & set(index.flatten().tolist())
    scores = weight.square() * inputs.importance
    scores[:, [*range(32, 48), *range(80, 96)]] = -1
    assert torch.equal(index, scores.topk(3, dim=1).indices.sort(dim=1).values)


@pytest.mark.parametrize(
    "format", [FORMAT, "int2-g16-asym/2%fp16", "int2-g16-asym+2xint4-g16-asym", PAPER]
)
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_change_far_less_than_at_two_bits_throughout(format, act_order):
    weight, inputs = problem()
    plain = Gptq(act_order=act_order).quantize(task(weight, inputs, "int2-g16-asym")).weight
    found = Mixed(act_order=act_order).quantize(task(weight, inputs, format)).weight
    assert found.format == parse_format(format)
    assert error(inputs, weight, found) < 0.7 * error(inputs, weight, plain)


def test_number_with_a_float_has_no_error():
    weight, inputs = problem()
    found = Mixed().quantize(task(weight, inputs, "int2-g16-asym/100xfp16")).weight
    # 100 of 128 numbers of a row have a float; what the others ask of them, they take.
    assert error(inputs, weight, found) < 1e-3


def test_all_is_counted_and_below_three_bits():
    format = parse_format(PAPER)
    assert format.bits_per_weight((4096, 4096)) == pytest.approx(2.84, abs=0.01)


def test_one_format_for_all_weights_is_left_to_gptq():
    weight, inputs = problem()
    found = Mixed().quantize(task(weight, inputs, "int2-g16"))
    plain = Gptq().quantize(task(weight, inputs, "int2-g16"))
    assert torch.equal(found.weight.tensors["codes"], plain.weight.tensors["codes"])
    assert found.notes == ("nothing to divide in int2-g16",)
