"""Columns of the largest inputs stay floats, weights and activations alike."""

import pytest
import torch

import qcompile as qc
from qcompile.calibration.samples import ExampleInputs
from qcompile.calibration.settings import Calibration
from qcompile.calibration.statistics import Hessian
from qcompile.formats import parse_format
from qcompile.passes.infra import Context, PassManager
from qcompile.passes.lower.rounded_inputs import rounded_input
from qcompile.passes.lower.split_linears import SplitLinears
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.quik import Quik
from qcompile.pipeline import recipe_phases
from qcompile.recipe import load_recipe

aten = torch.ops.aten
OUTLIERS = [7, 30]


def inputs(rows, seed):
    x = torch.randn(rows, 48, generator=torch.Generator().manual_seed(seed))
    x[:, OUTLIERS] *= 60
    return x


def compiled(weights, activations):
    """A layer whose inputs have outlier channels, after a recipe."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(48, 32, bias=False))
    with torch.no_grad():
        layer[0].weight[:, OUTLIERS] /= 60  # all inputs count alike
    program = qc.capture(layer, inputs(5, 1))
    steps = [{"quantize_weights": weights}, {"quantize_activations": activations}]
    phases = recipe_phases(load_recipe({"name": "x", "steps": steps}))
    context = Context(calibration=Calibration(ExampleInputs([inputs(64, 2), inputs(64, 3)])))
    return program, PassManager(phases).run(program, context)[0]


def test_outliers_are_the_columns_of_the_largest_inputs_whatever_the_weights():
    hessian = Hessian()
    hessian.update(inputs(200, 0))
    spike = torch.zeros(1, 48)
    spike[0, 11] = 1000.0  # a single token is enough
    hessian.update(spike)
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 50.0
    task = Task("w", weight, parse_format("int4+3xfp16"), "absmax", Inputs(hessian))
    found = Quik().quantize(task).weight
    assert torch.argsort(found.tensors["places"])[-3:].tolist() == [7, 11, 30]


@pytest.mark.parametrize("activations", ["int4", "int8"])
def test_outlier_channels_do_not_spoil_the_scale_of_a_token(activations):
    x, errors = inputs(100, 4), []
    for weights in (
        {"format": "int8+2xfp16", "method": "quik"},
        {"format": "int8", "method": "gptq"},
    ):
        program, after = compiled(weights, {"format": activations})
        expected = program(x)
        errors.append(float((after(x) - expected).norm() / expected.norm()))
    # With outliers in the scale nearly all else becomes 0 at 4 bit, whose own error is a tenth.
    assert errors[0] < errors[1] / 8


def test_floats_meet_floats_and_codes_meet_codes():
    _, after = compiled({"format": "int4+2xfp16", "method": "quik"}, {"format": "int8"})
    x = inputs(9, 5)
    before = after(x)
    lowered = qc.run_passes(after, [SplitLinears()])
    # Sums of 48 products in another order.
    torch.testing.assert_close(lowered(x), before, rtol=1e-5, atol=1e-5)
    coded, floats = lowered.calls(aten.linear.default)
    rounded = rounded_input(coded.args[0])
    assert rounded.source.target == floats.args[0].target == aten.index_select.default
    assert rounded.source.meta["val"].shape[-1] == 46
    assert floats.args[0].meta["val"].shape[-1] == 2


@pytest.mark.parametrize("granularity", ["token", "tensor", "channel"])
def test_each_part_has_scales_of_its_own(granularity):
    program, after = compiled(
        {"format": "int4-g16+16xint8-g16+2xfp16", "method": "quik"},
        {"format": "int8", "granularity": granularity},
    )
    x = inputs(50, 6)
    expected = program(x)
    assert float((after(x) - expected).norm() / expected.norm()) < 0.12
    lowered = qc.run_passes(after, [SplitLinears()])
    sources = [rounded_input(linear.args[0]) for linear in lowered.calls(aten.linear.default)]
    assert [source is None for source in sources] == [False, False, True]
    if granularity != "token":
        assert sources[0].scale.target != sources[1].scale.target
