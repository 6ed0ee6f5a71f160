"""Bits move from groups that do not mind to groups that do, and their sum stays."""

from dataclasses import replace

import pytest
import torch

from qcompile.calibration.statistics import Hessian
from qcompile.formats import IntegerFormat, LookupFormat, SplitFormat, parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.slim import OutputLoss, Slim


def problem(sizes, group=16, rows=16, seed=0):
    """A weight, and inputs whose groups of channels are of the given sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(sizes).repeat_interleave(group)
    hessian = Hessian()
    hessian.update(torch.randn(20 * len(size), len(size), generator=generator) * size)
    return torch.randn(rows, len(size), generator=generator), Inputs(hessian)


def task(weight, inputs, format):
    return Task("w", weight, parse_format(format), "mse", inputs)


UNEVEN = [1.0, 8.0, 1.0, 0.1, 1.0, 0.2, 6.0, 1.0]


@pytest.mark.parametrize("format", ["int2-g16-asym", "int3-g16", "int4-g16-asym"])
def test_groups_of_large_inputs_get_a_bit_and_those_of_small_ones_give_it(format):
    weight, inputs = problem(UNEVEN)
    outcome = Slim().quantize(task(weight, inputs, format))
    found = outcome.weight.format
    assert isinstance(found, SplitFormat)
    _, low, high = (
        [column // 16 for column in columns.tolist()]
        for columns in torch.argsort(outcome.weight.tensors["places"]).split(found.widths(128))
    )
    assert set(high[:32]) == {1, 6}
    assert set(low[-32:]) == {3, 5}
    assert len(low) == len(high)
    groups = len(high) // 16
    assert outcome.notes == (
        f"{groups} of 8 groups have {found.base.bits + 1} bit, as many {found.base.bits - 1}",
    )


def test_groups_are_of_like_columns_wherever_these_stand():
    # Every second group is of large inputs; then the same columns, shuffled.
    weight, inputs = problem([0.1, 8.0] * 4)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    shuffled = Inputs(Hessian(inputs.hessian.sum[order][:, order], inputs.hessian.count))
    plain = Slim().quantize(task(weight, inputs, "int2-g16-asym"))
    mixed = Slim().quantize(task(weight[:, order], shuffled, "int2-g16-asym"))
    assert mixed.weight.format == plain.weight.format
    errors = [
        seen.relative_error(w, made.weight.format.decode(made.weight))
        for seen, w, made in ((inputs, weight, plain), (shuffled, weight[:, order], mixed))
    ]
    assert errors[1] < 1.2 * errors[0]


def test_giant_tokens_count_as_others_do():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    rows = torch.randn(256, 32, generator=generator)
    rows[:, 16:] = 0
    rows[0, :16], rows[0, 16:] = 0, 100
    hessian = Hessian()
    hessian.update(rows)
    given = replace(task(weight, Inputs(hessian, rows), "int2-g16-asym"))
    loss = OutputLoss.of(given)
    for_ordinary, for_giant = (0.1 * weight for _ in range(2))
    for_ordinary[:, 16:], for_giant[:, :16] = 0, 0
    errors = [given.seen.relative_error(weight, weight + e) for e in (for_ordinary, for_giant)]
    losses = [loss(weight + error) for error in (for_ordinary, for_giant)]
    assert errors[0] < 0.05 * errors[1]
    assert losses[0] > 2 * losses[1]


@pytest.mark.parametrize("format", ["int2-g16-asym", "int3-g16", "int4-g16-asym"])
def test_codes_take_the_same_bits_as_before(format):
    weight, inputs = problem(UNEVEN)
    found = Slim().quantize(task(weight, inputs, format)).weight.format
    plain = parse_format(format)
    codes = found.bits_by_part((16, 128))["codes"]
    assert codes == plain.bits_by_part((16, 128))["codes"]


@pytest.mark.parametrize("format", ["int2-g16-asym", "int3-g16", "int3-g16-asym"])
def test_outputs_change_less_than_with_gptq_at_the_same_bits(format):
    weight, inputs = problem(UNEVEN)
    found = [m.quantize(task(weight, inputs, format)).weight for m in (Slim(), Gptq())]
    mixed, plain = (inputs.relative_error(weight, q.format.decode(q)) for q in found)
    assert mixed < 0.5 * plain


def test_weight_without_salient_groups_is_left_as_it_is():
    weight, inputs = problem([1.0] * 6)
    outcome = Slim().quantize(task(weight, inputs, "int2-g16-asym"))
    plain = Gptq().quantize(task(weight, inputs, "int2-g16-asym"))
    assert outcome.weight.format == parse_format("int2-g16-asym")
    assert torch.equal(outcome.weight.tensors["codes"], plain.weight.tensors["codes"])


def test_groups_below_two_bits_are_plus_or_minus_a_scale():
    weight, inputs = problem(UNEVEN)
    outcome = Slim().quantize(task(weight, inputs, "int2-g16-asym"))
    low = outcome.weight.format.formats[1]
    assert isinstance(low, LookupFormat)
    assert low.levels == (-1.0, 1.0)


def test_last_group_that_is_short_keeps_its_bits():
    weight, inputs = problem(UNEVEN)
    narrow = Hessian(inputs.hessian.sum[:120, :120], inputs.hessian.count)
    outcome = Slim().quantize(task(weight[:, :120], Inputs(narrow), "int3-g16-asym"))
    found = outcome.weight.format
    assert isinstance(found.base, IntegerFormat)
    assert [width % 16 for width in found.widths(120)] == [8, 0, 0]


@pytest.mark.parametrize("format", ["int2", "int8-g16", "nf4-g16"])
def test_format_without_bits_to_move_is_left_to_gptq(format):
    weight, inputs = problem(UNEVEN)
    outcome = Slim().quantize(task(weight, inputs, format))
    plain = Gptq().quantize(task(weight, inputs, format))
    assert torch.equal(outcome.weight.tensors["codes"], plain.weight.tensors["codes"])
    assert outcome.notes == (f"nothing to divide in {format}",)


def test_weight_of_a_stack_keeps_the_format_that_all_share():
    weight, inputs = problem(UNEVEN)
    shared = replace(task(weight, inputs, "int2-g16-asym"), alone=False)
    assert str(Slim().quantize(shared).weight.format) == "int2-g16-asym"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("act_order", [False, True])
def test_no_weight_fares_worse_than_with_gptq(seed, act_order):
    weight, inputs = problem([1.0, 1.3, 0.8, 1.5, 0.7, 1.0, 1.2, 0.9], seed=seed)
    options = {"act_order": act_order}
    found = [m(**options).quantize(task(weight, inputs, "int2-g16-asym")) for m in (Slim, Gptq)]
    mixed, plain = (inputs.relative_error(weight, o.weight.format.decode(o.weight)) for o in found)
    assert mixed <= plain
