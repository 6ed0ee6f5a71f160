"""The oracles of 8-bit float activations, against torch's types and the table of their levels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir import dialect
from qcompile.kernels.lookup.levels import levels
from qcompile.kernels.lookup.reference import lookup
from qcompile.kernels.quantize_float8.reference import (
    FLOAT8_TYPES,
    float8_scale,
    largest_float8,
    quantize_float8,
)

ONE = torch.ones(1)


@pytest.mark.parametrize("table", FLOAT8_TYPES)
def test_codes_are_those_that_lookup_decodes(table: str) -> None:
    exact = torch.tensor([value for value in levels(table) if math.isfinite(value)])
    codes = quantize_float8(exact, ONE, table, 0)
    assert codes.dtype == torch.uint8
    assert torch.equal(lookup(codes, None, table, 0), exact)


@pytest.mark.parametrize("table", FLOAT8_TYPES)
def test_halves_go_to_the_even_code(table: str) -> None:
    positive = sorted({value for value in levels(table) if math.isfinite(value) and value >= 0})
    halves = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(positive)])
    codes = quantize_float8(halves, ONE, table, 0)
    assert (codes % 2 == 0).all()


def test_values_beyond_the_largest_level_saturate() -> None:
    x = torch.tensor([500.0, -1e30, math.inf, -math.inf])
    values = lookup(quantize_float8(x, ONE, "e4m3", 0), None, "e4m3", 0)
    assert values.tolist() == [448, -448, 448, -448]


@pytest.mark.parametrize("table", FLOAT8_TYPES)
def test_what_is_no_number_stays_none(table: str) -> None:
    code = quantize_float8(torch.tensor([math.nan]), ONE, table, 0)
    assert lookup(code, None, table, 0).isnan().all()


def test_scale_makes_the_largest_value_the_largest_level() -> None:
    x = torch.tensor([[-896.0, 1.0, 224.0], [0.0, 0.0, 0.0]])
    assert float8_scale(x, "e4m3", 0).tolist() == [[2.0], [1.0]]
    assert float8_scale(x[0], "e4m3", 2).tolist() == [2.0, 0.5]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    group_size=st.sampled_from([0, 1, 16]),
    table=st.sampled_from(sorted(FLOAT8_TYPES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_round_trip_errs_at_most_half_a_unit_of_the_mantissa(
    size: int, group_size: int, table: str, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scale = dialect.float8_scale(x, table, group_size)
    codes = dialect.quantize_float8(x, scale, table, group_size)
    values = dialect.lookup(codes, scale, table, group_size)
    mantissa_bits, least_exponent = {"e4m3": (3, -6), "e5m2": (2, -14)}[table]
    unit = 2.0**-mantissa_bits
    # Half a unit relative to the value, or of the subnormals'; a few roundings of float32 beside.
    per_value = scale.repeat_interleave(group_size or size, dim=-1)[..., :size]
    bound = torch.maximum(x.abs().double(), per_value.double() * 2.0**least_exponent) * unit / 2
    assert ((values.double() - x.double()).abs() <= bound * (1 + 1e-6)).all()


def test_other_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="'e2m1' are no 8-bit floats: e4m3, e5m2"):
        largest_float8("e2m1")
