"""Split formats: columns that are stored in different ways, counted and found again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.formats.composite import (
    check_name,
    check_overflow_is_named,
    encoded_as_declared,
    float_program,
    normal,
    one_stored_weight,
    quantized_program,
)

from qcompile.errors import RecipeError
from qcompile.formats import SplitFormat, parse_format
from qcompile.formats.split import side_by_side
from qcompile.ir.edit import Editor
from qcompile.passes.infra import Context
from qcompile.passes.lower.split_linears import SplitLinears
from qcompile.passes.quantize.layers import layer_weights
from qcompile.passes.quantize.replace_weight import replace_weight
from qcompile.passes.quantize.split_inputs import regroup_input

aten = torch.ops.aten

NAMES = (
    "int3-g16-asym+5%fp16",
    "int4+3xbf16",
    "int2-g16+2xint1-g16+2xint3-g16",
    "int2-g16-asym+10%int4-g16+4xnf4-g16-bf16",
    "nf4-g32+8%fp32",
)


@pytest.mark.parametrize("name", NAMES)
def test_name_reads_back_as_an_equal_format(name):
    check_name(name, SplitFormat)


@pytest.mark.parametrize(
    "name", ["int4+fp16", "int4+0%fp16", "int4+100%fp16", "int4+0xfp16", "int4+1%", "int4+1%x9"]
)
def test_part_that_means_nothing_is_named(name):
    with pytest.raises(RecipeError, match="format"):
        parse_format(name)


def test_codes_of_several_weights_cannot_be_a_part():
    with pytest.raises(RecipeError, match="cannot have some columns of a weight"):
        parse_format("higgs2x16-g16+1%fp16")


def test_sixteen_bits_alone_are_no_format():
    with pytest.raises(RecipeError, match="unknown format 'fp16'"):
        parse_format("fp16")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(NAMES), columns=st.integers(81, 200), seed=st.integers(0, 99))
def test_encode_gives_the_tensors_that_the_format_declares(name, columns, seed):
    quantized = encoded_as_declared(name, (3, columns), seed)
    assert sum(quantized.format.widths(columns)) == columns
    places = quantized.tensors["places"]
    assert sorted(places.tolist()) == list(range(columns))


@pytest.mark.parametrize("name", NAMES)
def test_each_column_is_what_its_own_format_makes_of_it(name):
    format, weight = parse_format(name), normal(4, 100)
    quantized = format.encode(weight)
    decoded = format.decode(quantized)
    columns = torch.argsort(quantized.tensors["places"])
    for part, chosen in zip(
        format.take_apart(quantized), columns.split(format.widths(100)), strict=True
    ):
        alone = part.format.encode(weight[:, chosen])
        assert torch.equal(decoded[:, chosen], part.format.decode(alone))
    half = format.rows(quantized, 1, 3)
    assert torch.equal(format.decode(half), decoded[1:3])


def test_columns_of_the_largest_weights_stay_floats():
    weight = normal(8, 64)
    weight[:, [5, 40]] *= 50
    format = parse_format("int4+2xfp16")
    quantized = format.encode(weight)
    assert torch.argsort(quantized.tensors["places"])[-2:].tolist() == [5, 40]
    rest = [column for column in range(64) if column not in (5, 40)]
    # What the plain format makes of the others is mostly 0: its range has to reach the outliers.
    for kind, most in ((format, 0.2), (parse_format("int4"), 1.1)):
        errors = (kind.decode(kind.encode(weight)) - weight)[:, rest]
        assert most / 2 < errors.norm() / weight[:, rest].norm() < most


def test_more_bits_go_to_higher_scores_in_whole_groups():
    scores = torch.arange(70.0)
    scores[:16] = 100
    base, low, high = parse_format("int2-g16+1xint1-g16+1xint3-g16").divide(scores)
    assert high.tolist() == list(range(16))
    assert low.tolist() == list(range(16, 32))
    assert base.tolist() == list(range(32, 70))


def test_bits_are_those_of_the_parts_and_an_index_per_column():
    bits = parse_format("int3-g16-asym+4xfp16").bits_by_part((10, 68))
    assert bits == {
        "codes": 10 * 64 * 3 + 10 * 4 * 16,
        "scale": 10 * 4 * 16,
        "zero_point": 10 * 4 * 3,
        "places": 68 * 16,
    }


def test_parts_that_take_everything_are_refused():
    with pytest.raises(RecipeError, match="leaves no column of 32 for int4"):
        parse_format("int4+32xfp16").tensors((8, 32))


def test_outlier_beyond_float16_is_refused_by_name():
    weight = check_overflow_is_named("int4+1xfp16")
    format = parse_format("int4+1xbf16")
    assert format.decode(format.encode(weight))[0, 3] == pytest.approx(1e6, rel=2**-8)


@pytest.mark.parametrize("name", NAMES)
def test_weight_is_one_in_the_program(name):
    stored = one_stored_weight(quantized_program(name), name)
    assert stored.format.widths(96) == parse_format(name).widths(96)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layer_is_the_sum_of_its_parts(name, bias):
    program, x = quantized_program(name, bias), normal(5, 96, seed=1)
    before = program(x)
    result = SplitLinears().run(program, Context())
    program.verify()
    assert result.rewrites == 1
    # Sums of 96 products in another order.
    torch.testing.assert_close(program(x), before, rtol=1e-5, atol=1e-5)
    parts = len(parse_format(name).formats)
    assert len(list(program.calls(aten.linear.default))) == parts
    assert not list(program.calls(aten.cat.default))


def test_columns_of_a_part_may_stand_in_any_order():
    program, x = float_program(), normal(5, 96, seed=1)
    format = parse_format("int2-g16-asym+1xint1-g16+1xint3-g16-asym")
    columns = torch.randperm(96, generator=torch.Generator().manual_seed(2))
    columns = columns.split(format.widths(96))
    weight = program.weights.materialize("0.weight")
    parts = [
        part.encode(weight[:, chosen]) for part, chosen in zip(format.formats, columns, strict=True)
    ]
    quantized = format.join(parts, columns, tuple(weight.shape))
    ((layer, *_), _) = layer_weights(program)
    replace_weight(program, layer, quantized)
    bias = program.weights.materialize("0.bias")
    expected = torch.nn.functional.linear(x, format.decode(quantized), bias)
    torch.testing.assert_close(program(x), expected, rtol=1e-6, atol=1e-6)
    SplitLinears().run(program, Context())
    torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-5)


def test_regrouped_input_is_the_same_and_read_by_parts():
    program, x = quantized_program("int4+3xfp16"), normal(5, 96, seed=1)
    before = program(x)
    (linear,) = program.calls(aten.linear.default)
    parts = regroup_input(Editor(program), linear)
    assert torch.equal(program(x), before)
    assert regroup_input(Editor(program), linear) == parts
    assert side_by_side(linear.args[0])[0] == parts
    SplitLinears().run(program, Context())
    assert len(list(program.calls(aten.index_select.default))) == 2
    torch.testing.assert_close(program(x), before, rtol=1e-5, atol=1e-5)
