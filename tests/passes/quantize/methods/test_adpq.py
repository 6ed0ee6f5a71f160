"""The largest weights of a row leave the grid to the others."""

import pytest
import torch

from qcompile.formats import parse_format, relative_error, rtn
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.adpq import Adpq, adaptive_lasso


def heavy_tailed(rows=24, columns=128, seed=0):
    """Student's t with four degrees of freedom: what weights of language models look like."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(4.0).sample((rows, columns))


def task(weight, format, search="absmax"):
    return Task("w", weight, parse_format(format), search)


def test_lasso_is_the_minimum_of_its_objective():
    weight = heavy_tailed(1, 40)
    penalty = torch.tensor([[0.6]])
    found = adaptive_lasso(weight, penalty)
    grid = torch.linspace(-8, 8, 16001)[:, None]
    objective = 0.5 * (grid - weight) ** 2 + penalty * grid.abs() / weight.abs()
    inside = weight.abs() < 8
    best = grid[objective.argmin(0)].T
    torch.testing.assert_close(found[inside], best[inside], rtol=0, atol=1e-3)
    assert torch.equal(found != 0, weight.abs() > 0.6**0.5)


def test_as_many_survive_in_each_row_as_the_format_says():
    weight = heavy_tailed()
    found = Adpq().quantize(task(weight, "int3-g32-asym/5%fp16")).weight
    index = found.tensors["index"].long()
    assert index.shape == (24, 6)
    smallest = weight.abs().gather(1, index).amin(1)
    assert bool((weight.abs() >= smallest[:, None]).sum(1).eq(6).all())


@pytest.mark.parametrize(("bits", "most"), [(3, 0.93), (4, 0.97)])
def test_heavy_tails_err_less_than_with_smaller_groups_of_more_bits(bits, most):
    weight = heavy_tailed(64, 1024)
    found = Adpq().quantize(task(weight, f"int{bits}-g128-asym/0.4%fp16", "mse")).weight
    finer = rtn(weight, parse_format(f"int{bits}-g64-asym"), scale_search="mse")
    assert found.format.stored_bits((64, 1024)) < finer.weight.format.stored_bits((64, 1024))
    assert relative_error(weight, found) < most * finer.relative_error


def test_row_of_one_size_is_stored_as_it_is():
    weight = torch.ones(2, 32)
    found = Adpq().quantize(task(weight, "int4/3xfp16")).weight
    torch.testing.assert_close(found.format.decode(found), weight, rtol=2**-10, atol=0)


def test_format_without_floats_is_rounded_to_nearest():
    weight = heavy_tailed()
    found = Adpq().quantize(task(weight, "int4-g32"))
    plain = parse_format("int4-g32").encode(weight)
    assert torch.equal(found.weight.tensors["codes"], plain.tensors["codes"])
    assert found.notes == ("nothing to divide in int4-g32",)
