from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats import IntegerFormat, ScaleSearch, parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.integer_learner import IntegerLearner, IntegerPlan

FORMATS = ["int4", "int4-g64-asym", "int3-g48", "int2-g64-asym-bf16", "int2-g16", "int1", "int8"]
ROUNDING = IntegerPlan(0.01, rounding_rate=0.01)
CLIPPING = IntegerPlan(0.01, logistic=True)


def weight() -> Tensor:
    """A short last group, and a group of zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 100, generator=generator)
    values[3, :64] = 0
    return values


def learner(name: str, plan: IntegerPlan, search: ScaleSearch = "absmax") -> IntegerLearner:
    task = Task("w", weight(), parse_format(name), search)
    return IntegerLearner(task, plan, "a test")


def scramble(found: IntegerLearner) -> None:
    """Numbers such as a descent may find."""
    generator = torch.Generator().manual_seed(1)
    for each in found.learnables:
        each.assign(each.value + 0.3 * torch.randn(each.value.shape, generator=generator))
        each.project()


@pytest.mark.parametrize("plan", [ROUNDING, CLIPPING], ids=["rounding", "clipping"])
@pytest.mark.parametrize("name", FORMATS)
def test_stored_weight_decodes_to_what_was_learned_with(name: str, plan: IntegerPlan) -> None:
    found = learner(name, plan)
    scramble(found)
    for given in (weight(), 2 * weight()):  # as it was, and as scales have made it
        stored = found.finish(given)
        assert torch.equal(stored.format.decode(stored), found.decode(given).detach())


@pytest.mark.parametrize("search", ["absmax", "mse"])
@pytest.mark.parametrize("name", FORMATS)
def test_start_is_rounding_to_nearest(name: str, search: ScaleSearch) -> None:
    format = parse_format(name)
    assert isinstance(format, IntegerFormat)
    found = learner(name, ROUNDING, search)
    expected = format.decode(format.encode(weight(), scale_search=search))
    error = (format.decode(found.finish(weight())) - weight()).square().sum()
    # Ends of asymmetric ranges that reach past all weights are taken back to them.
    assert error <= 1.05 * (expected - weight()).square().sum()
    if format.symmetric:
        same = (format.decode(found.finish(weight())) == expected).float().mean()
        assert same > 0.99  # but for scales that are another rounding of the same number


def test_ranges_that_are_not_clipped_start_a_little_clipped_where_they_are_logistic() -> None:
    for factor in learner("int4-g64-asym", CLIPPING).learnables:
        assert float(factor.value.detach().max()) == pytest.approx(4.0, abs=0.01)


def test_offsets_move_weights_to_the_next_code_at_most() -> None:
    found = learner("int4-g64", ROUNDING)
    before = found.finish(weight()).tensors["codes"].int()
    found.learnables[-1].assign(torch.full((8, 2, 64), 9.0))
    found.learnables[-1].project()
    moved = found.finish(weight()).tensors["codes"].int() - before
    assert moved.min() == 0
    assert moved.max() == 1


def test_all_numbers_have_gradients() -> None:
    for plan in (ROUNDING, CLIPPING):
        found = learner("int3-g48-asym", plan)
        scramble(found)
        values = [each.value for each in found.learnables]
        gradients = torch.autograd.grad(found.decode(weight()).square().sum(), values)
        assert all(bool((gradient != 0).any()) for gradient in gradients)


def test_other_formats_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match=r"method 'a test' .* 'w' is to be nf4-g64"):
        learner("nf4-g64", ROUNDING)


def test_float_zero_points_are_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="'w' is to be int4-g64-asym16") as refusal:
        learner("int4-g64-asym16", ROUNDING)
    assert "int4-g64-asym," in str(refusal.value)
