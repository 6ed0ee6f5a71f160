from dataclasses import replace

import pytest
import torch

from qcompile.errors import RecipeError
from qcompile.formats import parse_format
from qcompile.kernels.quantize.groups import split_groups
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.hqq import Hqq


def weight():
    """Heavy tails, as weights have, more on one side than on the other; a short last group."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 200, generator=generator) + 0.1
    return values * torch.rand(64, 200, generator=generator).exp()


def found(name, **options):
    """A weight and what HQQ makes of it."""
    format, exact = parse_format(name), weight()
    return format, exact, Hqq(**options).quantize(Task("w", exact, format, "absmax")).weight


def square(format, quantized, exact):
    """Squared error of each group."""
    errors = format.decode(quantized) - exact
    return split_groups(errors, format.group_size).square().sum(-1)


@pytest.mark.parametrize("name", ["int4-g64-asym16", "int3-g64-asym16", "int4-asym16"])
def test_errors_of_a_group_cancel_out_where_zero_points_are_floats(name):
    format, exact, quantized = found(name)
    errors = split_groups(format.decode(quantized) - exact, format.group_size)
    sizes = errors.abs().sum(-1)
    # What is left are roundings of zero points, to multiples of 2^-12 and then to float16.
    zeros, scale = (quantized.tensors[part].float() for part in ("zero_point", "scale"))
    rounding = (2**-13 + 2**-11 * zeros.abs()) * scale * (format.group_size or 200)
    assert bool((errors.sum(-1).abs() <= rounding).all())
    plain = format.encode(exact)
    before = split_groups(format.decode(plain) - exact, format.group_size).sum(-1).abs()
    assert float((errors.sum(-1).abs() / sizes).mean()) < 0.1 * float((before / sizes).mean())


@pytest.mark.parametrize("name", ["int4-g64-asym16", "int4-g64-asym", "int3-g64", "int3-asym"])
def test_codes_decode_nearest_with_the_parameters_found(name):
    format, exact, quantized = found(name)
    least = square(format, quantized, exact).sum(-1)
    parts = ["scale", "zero_point"] if format.has_float_zero_points else ["scale"]
    for part in parts:
        for factor in (0.99, 1.01):
            moved = {**quantized.tensors, part: quantized.tensors[part] * factor}
            assert bool(
                (square(format, replace(quantized, tensors=moved), exact).sum(-1) > least).all()
            )


@pytest.mark.parametrize("name", ["int4-g64-asym", "int3-g64-asym", "int2-g32-asym", "int4-g64"])
def test_no_group_of_whole_zero_points_errs_more_than_by_rounding(name):
    format, exact, quantized = found(name, steps=0)
    before = square(format, format.encode(exact), exact)
    after = square(format, quantized, exact)
    assert bool((after <= before * (1 + 2**-9)).all())  # the scale is rounded to float16
    assert float(after.sum()) < float(before.sum())


def test_zero_points_begin_at_whole_numbers():
    # One step from there is not far: a mean of 64 errors, each up to half a step.
    _, _, quantized = found("int4-g64-asym16", steps=1)
    zeros = quantized.tensors["zero_point"].float()
    assert float((zeros - zeros.round()).abs().mean()) < 0.1


def test_steps_leave_sparser_errors():
    format, exact, none = found("int3-g64-asym16", steps=0)
    _, _, some = found("int3-g64-asym16", steps=20)
    loss = [float((format.decode(q) - exact).abs().pow(0.7).sum()) for q in (none, some)]
    assert loss[1] < loss[0]


def test_padding_of_a_short_group_does_not_count():
    format, exact, quantized = found("int4-g64-asym16")
    errors = (format.decode(quantized) - exact)[:, 192:]  # 8 of the last group
    zeros, scale = (quantized.tensors[part][:, -1].float() for part in ("zero_point", "scale"))
    assert bool((errors.sum(-1).abs() <= (2**-13 + 2**-11 * zeros.abs()) * scale * 8).all())


def test_other_formats_are_refused_by_name():
    with pytest.raises(RecipeError, match="'w' is to be nf4-g64"):
        Hqq().quantize(Task("w", weight(), parse_format("nf4-g64"), "absmax"))
