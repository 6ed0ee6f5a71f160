"""Floats beside a few numbers of each row: what they add, what they take, how they are found."""

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
from qcompile.formats import SparseFormat, parse_format

NAMES = ("int3-g16-asym/5%fp16", "int4/3xfp16", "nf4-g32-dq/1%fp16", "int2-g16+10%int4-g16/2%fp16")


@pytest.mark.parametrize("name", NAMES)
def test_name_reads_back_as_an_equal_format(name):
    check_name(name, SparseFormat)


@pytest.mark.parametrize(
    "name", ["int4/fp16", "int4/1%int8", "int4/0%fp16", "int4/1%fp16/1%fp16", "higgs2x16/1%fp16"]
)
def test_side_that_means_nothing_is_named(name):
    with pytest.raises(RecipeError, match="format"):
        parse_format(name)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), columns=st.integers(33, 100), seed=st.integers(0, 99))
def test_encode_gives_the_tensors_that_the_format_declares(name, columns, seed):
    quantized = encoded_as_declared(name, (3, columns), seed)
    rows = quantized.tensors["index"].tolist()
    assert all(row == sorted(set(row)) for row in rows)


@pytest.mark.parametrize("name", NAMES)
def test_largest_weights_come_back_as_they_are(name):
    weight = normal(6, 64)
    weight[torch.arange(6), torch.arange(6) * 9] = 40.0
    format = parse_format(name)
    decoded = format.decode(format.encode(weight))
    # A float16 of what the base lacks.
    assert (decoded[torch.arange(6), torch.arange(6) * 9] - 40.0).abs().max() < 40 * 2**-11
    # And they do not widen the range of the others.
    rest = weight.abs() < 10
    assert (decoded - weight)[rest].norm() < 0.5 * weight[rest].norm()


def test_bits_are_those_of_the_base_and_two_numbers_a_place():
    base = parse_format("int3-g16-asym").bits_by_part((10, 64))
    bits = parse_format("int3-g16-asym/5%fp16").bits_by_part((10, 64))
    assert bits == {**base, "codes": base["codes"] + 10 * 3 * 16, "index": 10 * 3 * 16}


def test_more_floats_than_numbers_are_refused():
    with pytest.raises(RecipeError, match="more floats beside a row than its 4 numbers"):
        parse_format("int4/9xfp16").tensors((2, 4))


def test_outlier_beyond_float16_is_refused_by_name():
    check_overflow_is_named("int4/1xfp16")


@pytest.mark.parametrize("name", NAMES)
def test_weight_is_one_in_the_program(name):
    before, after = float_program(), quantized_program(name)
    stored = one_stored_weight(after, name)
    assert stored.format.count(96) == parse_format(name).count(96)
    weight, bias = map(before.weights.materialize, ("0.weight", "0.bias"))
    decoded = parse_format(name).decode(parse_format(name).encode(weight))
    x = normal(5, 96, seed=1)
    expected = torch.nn.functional.linear(x, decoded, bias)
    torch.testing.assert_close(after(x), expected, rtol=1e-6, atol=1e-6)
