"""GPTQ chooses what the paper's own algorithm chooses, and never does worse than rounding."""

import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.errors import ModelError, RecipeError
from qcompile.formats import parse_format, rtn
from qcompile.passes.quantize.methods import METHODS, Task, make_method
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs, feedback

FORMATS = ("int4", "int4-asym", "int4-g16", "int3-g16-asym", "int2-g20", "nf4-g16")


def problem(width=40, rows=12, tokens=200, seed=0):
    """A weight and correlated inputs of uneven size; groups of 16 leave a short last one."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix * torch.logspace(-1, 1, width)
    hessian = Hessian()
    hessian.update(x)
    return torch.randn(rows, width, generator=generator), Inputs(hessian)


def task(weight, inputs, format, search="absmax"):
    return Task("w", weight, parse_format(format), search, inputs)


def textbook_gptq(weight, hessian, format, damping, act_order, static):
    """Codes by the published algorithm: the Cholesky factor of the inverse Hessian, float64."""
    grid = format.grid
    size = grid.group_size or weight.shape[1]
    w, h = weight.double().clone(), hessian.clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(len(h))
    w, h = w[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    fitted = {g: grid.fit(weight[:, g * size : (g + 1) * size]) for g in range(-(-len(h) // size))}
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for position, column in enumerate(order.tolist()):
        if not static and column % size == 0:
            fitted[column // size] = grid.fit(w[:, column : column + size].float())
        parameters = fitted[column // size]
        target = w[:, position : position + 1]
        codes[:, column : column + 1] = grid.nearest(target.float(), parameters)
        decoded = grid.decode(codes[:, column : column + 1], parameters).double()
        error = (target - decoded) / upper[position, position]
        w[:, position + 1 :] -= error @ upper[position : position + 1, position + 1 :]
    return codes


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "options",
    [{}, {"static_groups": True}, {"act_order": True}, {"damping": 0.1}],
    ids=str,
)
def test_codes_are_those_of_the_published_algorithm(format, options):
    weight, inputs = problem()
    method = Gptq(**options, weigh_scales=False)
    found = method.quantize(task(weight, inputs, format)).weight.tensors["codes"]
    parsed = parse_format(format)
    static = method.act_order or method.static_groups or not parsed.grid.group_size
    expected = textbook_gptq(
        weight, inputs.hessian.matrix, parsed, method.damping, method.act_order, static
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_change_less_than_by_rounding(format, act_order):
    weight, inputs = problem()

    def error(quantized):
        return inputs.relative_error(weight, quantized.format.decode(quantized))

    found = Gptq(act_order=act_order).quantize(task(weight, inputs, format, "mse")).weight
    assert error(found) < 0.9 * error(rtn(weight, parse_format(format), scale_search="mse").weight)


def test_blocks_do_not_change_the_codes():
    weight, inputs = problem(width=300)
    from qcompile.passes.quantize.methods.sweep import GridRounder, sweep

    found = inputs.feedback(damping=0.01, descending=False, name="w")
    grid = parse_format("int4").grid
    codes = []
    for block in (7, 128, 300):
        rounder = GridRounder(grid, weight, "absmax", "w")
        sweep(weight, found, rounder, block=block)
        codes.append(rounder.codes)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_dead_input_is_reported_and_rounded_alone():
    weight, inputs = problem()
    inputs.hessian.sum[5] = 0
    inputs.hessian.sum[:, 5] = 0
    method = Gptq(static_groups=True, weigh_scales=False)
    outcome = method.quantize(task(weight, inputs, "int4"))
    assert outcome.notes == ("1 of 40 inputs were always zero",)
    nearest = parse_format("int4").encode(weight).tensors["codes"]
    assert torch.equal(outcome.weight.tensors["codes"][:, 5], nearest[:, 5])


def test_dependent_inputs_raise_the_damping_and_say_so():
    x = torch.randn(30, 4) @ torch.randn(4, 20)
    hessian = Hessian()
    hessian.update(x)
    found = feedback(hessian, damping=0.0, descending=False, name="w")
    assert "damping raised from 0 to 1e-06" in found.notes[0]
    assert bool(found.lower.isfinite().all())


def test_input_that_was_never_seen_is_an_error_with_the_name():
    with pytest.raises(ModelError, match="no input of 'expert' was seen"):
        feedback(Hessian(), damping=0.01, descending=False, name="expert")


def test_factor_gives_back_the_hessian():
    _, inputs = problem()
    found = feedback(inputs.hessian, damping=0.0, descending=True, name="w")
    unit = found.lower.double() + torch.eye(40, dtype=torch.float64)
    ordered = inputs.hessian.matrix[found.order][:, found.order]
    diagonal = torch.linalg.solve(unit.T, ordered) @ torch.linalg.inv(unit)
    off = diagonal - torch.diag(diagonal.diagonal())
    assert float(off.abs().max()) < 1e-4 * float(diagonal.diagonal().max())


@pytest.mark.parametrize("name", METHODS)
def test_method_can_be_made_without_options(name):
    assert isinstance(make_method(name), METHODS[name])


def test_option_of_the_wrong_kind_is_refused():
    with pytest.raises(RecipeError, match="option act_order: must be a valid boolean"):
        make_method("gptq", {"act_order": "perhaps"})
    with pytest.raises(RecipeError, match="method 'gptq' has no option 'actorder'") as caught:
        make_method("gptq", {"actorder": True})
    assert "did you mean 'act_order'?" in str(caught.value.remedy)
