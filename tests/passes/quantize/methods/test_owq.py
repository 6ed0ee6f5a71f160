"""Weak columns stay floats and make up for the errors of the others."""

import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.formats import parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.owq import Owq
from qcompile.passes.quantize.methods.parts import sweep_parts

OUTLIERS = [3, 20, 41]


def problem(width=60, rows=16, tokens=300, seed=0):
    """A weight and correlated inputs, three of which are far larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x[:, OUTLIERS] *= 30
    hessian = Hessian()
    hessian.update(x)
    return torch.randn(rows, width, generator=generator), Inputs(hessian)


def task(weight, inputs, format, search="absmax"):
    return Task("w", weight, parse_format(format), search, inputs)


def float_columns(quantized):
    width = quantized.format.widths(quantized.shape[1])[-1]
    return torch.argsort(quantized.tensors["places"])[-width:].tolist()


def test_columns_of_the_largest_inputs_stay_floats():
    weight, inputs = problem()
    found = Owq().quantize(task(weight, inputs, "int3-asym+5%fp16")).weight
    assert float_columns(found) == OUTLIERS


def test_column_that_rounds_without_error_is_not_weak():
    weight, inputs = problem()
    # Rows have the levels -3 to 4, and one of the columns of large inputs is on one of them.
    weight[:, 0], weight[:, 1], weight[:, OUTLIERS[0]] = 4, -3, 1
    weight.clamp_(-3, 4)
    found = Owq().quantize(task(weight, inputs, "int3-asym+2xfp16")).weight
    assert float_columns(found) == OUTLIERS[1:]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("base", ["int3-asym", "int3-g16-asym", "int2-g20", "nf4-g16"])
def test_outputs_change_far_less_than_with_gptq_alone(base, act_order):
    weight, inputs = problem()
    split = Owq(act_order=act_order).quantize(task(weight, inputs, f"{base}+3xfp16")).weight
    plain = Gptq(act_order=act_order).quantize(task(weight, inputs, base)).weight
    errors = [inputs.relative_error(weight, q.format.decode(q)) for q in (split, plain)]
    assert errors[0] < 0.1 * errors[1]


def test_float_columns_take_the_errors_of_the_others():
    weight, inputs = problem()
    found = Owq().quantize(task(weight, inputs, "int3-asym+3xfp32")).weight
    decoded = found.format.decode(found)
    moved = decoded[:, OUTLIERS] - weight[:, OUTLIERS]
    # Given the other columns, these are the best that any numbers could be.
    hessian = inputs.hessian.matrix.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    rest = [column for column in range(60) if column not in OUTLIERS]
    errors = (decoded - weight)[:, rest].double()
    best = -errors @ hessian[rest][:, OUTLIERS] @ hessian[OUTLIERS][:, OUTLIERS].inverse()
    torch.testing.assert_close(moved.double(), best, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}], ids=str)
def test_parts_of_one_format_are_what_gptq_makes_of_the_whole(options):
    weight, inputs = problem()
    gptq = Gptq(**options)
    split = parse_format("int4-g16-asym+1xint4-g16-asym")
    columns = split.divide(torch.arange(60.0))
    joined = sweep_parts(task(weight, inputs, "int4-g16-asym"), split, columns, gptq).weight
    plain = gptq.quantize(task(weight, inputs, "int4-g16-asym")).weight
    assert torch.equal(split.decode(joined), plain.format.decode(plain))


def test_format_without_parts_is_left_to_gptq():
    weight, inputs = problem()
    found = Owq().quantize(task(weight, inputs, "int4-g16"))
    plain = Gptq().quantize(task(weight, inputs, "int4-g16"))
    assert torch.equal(found.weight.tensors["codes"], plain.weight.tensors["codes"])
    assert found.notes == ("nothing to divide in int4-g16",)
