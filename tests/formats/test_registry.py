import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.formats import IntegerFormat, parse_format


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int8", IntegerFormat(8)),
        ("int4-g64", IntegerFormat(4, 64)),
        ("int4-g32-asym", IntegerFormat(4, 32, symmetric=False)),
        ("int4-g64-bf16", IntegerFormat(4, 64, scale_dtype=torch.bfloat16)),
        ("int4-asym16-g32", IntegerFormat(4, 32, False, zero_dtype=torch.float16)),
        ("INT3-fp32-asym-g128", IntegerFormat(3, 128, False, torch.float32)),
        ("int5-sym-fp16", IntegerFormat(5)),
        ("int1-g7", IntegerFormat(1, 7)),
    ],
)
def test_parse_format_reads_each_part(text, expected):
    assert parse_format(text) == expected


@given(
    bits=st.integers(1, 8),
    group_size=st.integers(0, 4096),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_format_name_reads_back_as_equal_format(bits, group_size, symmetric, scale_dtype):
    original = IntegerFormat(bits, group_size, symmetric, scale_dtype)
    assert parse_format(str(original)) == original


def test_format_name_is_canonical():
    assert str(parse_format("int4-bf16-asym-g64")) == "int4-g64-asym-bf16"
    assert str(parse_format("int4-bf16-asym16-g64")) == "int4-g64-asym16-bf16"
    assert str(parse_format("int8-fp16-sym")) == "int8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "1 to 8 bits, not 9"),
        ("int0-g64", "1 to 8 bits, not 0"),
        ("imt4-g64", "did you mean 'int4'"),
        ("int", "unknown format 'int'"),
        ("", "formats are named int4-g64"),
        ("int4_g64", "did you mean 'int4'"),
        ("int4-asim", "did you mean 'asym'"),
        ("int4-64", "written g64"),
        ("int4-g0", "leave the group out"),
        ("int4-g32-g64", "once"),
        ("int4-asym-sym", "once"),
        ("int4-bf16-fp16", "once"),
        ("int4--g64", "cannot use ''"),
        ("int4-g", "after the family come"),
    ],
)
def test_parse_format_error_says_what_to_write(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_format(text)


def test_integer_format_refuses_negative_group():
    with pytest.raises(RecipeError, match="group size"):
        IntegerFormat(4, -1)


def test_symmetric_format_refuses_float_zero_points():
    with pytest.raises(RecipeError, match="no zero points to store as floats"):
        IntegerFormat(4, 64, zero_dtype=torch.float16)


def test_integer_format_refuses_unknown_scale_type():
    with pytest.raises(RecipeError, match="fp16, bf16, fp32"):
        IntegerFormat(4, 64, True, torch.float64)
