import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.formats import parse_format
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.hqq import Hqq


def weight():
    """Heavy tails, as weights have, and a short last group."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(64, 200, generator=generator) * torch.rand(64, 200, generator=generator).exp()
    )


def loss(format, quantized, exact, norm=0.7):
    return float((format.decode(quantized) - exact).abs().pow(norm).sum())


@pytest.mark.parametrize("name", ["int4-g64-asym", "int3-g64-asym", "int2-g32-asym", "int3-g64"])
def test_errors_are_sparser_than_by_rounding(name):
    format, exact = parse_format(name), weight()
    found = Hqq().quantize(Task("w", exact, format, "absmax")).weight
    assert loss(format, found, exact) < loss(format, format.encode(exact), exact)


def test_no_step_at_all_is_rounding_to_nearest():
    format, exact = parse_format("int4-g64-asym"), weight()
    found = Hqq(steps=0).quantize(Task("w", exact, format, "mse")).weight.tensors
    expected = format.encode(exact, scale_search="mse").tensors
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_codes_are_the_nearest_for_the_parameters_found():
    format, exact = parse_format("int3-g64-asym"), weight()
    found = Hqq().quantize(Task("w", exact, format, "absmax")).weight
    error = (format.decode(found) - exact).abs()
    for step in (-1, 1):
        moved = found.tensors["codes"].int() + step
        valid = (moved >= 0) & (moved <= 7)
        tensors = {**found.tensors, "codes": moved.clamp(0, 7).to(torch.uint8)}
        other = (format.decode(type(found)(format, found.shape, tensors)) - exact).abs()
        assert bool((other[valid] >= error[valid] - 1e-6).all())


def test_other_formats_are_refused_by_name():
    with pytest.raises(RecipeError, match="'w' is to be nf4-g64"):
        Hqq().quantize(Task("w", weight(), parse_format("nf4-g64"), "absmax"))
