"""The oracles of small-float activations, against torch's types and the table of their levels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir import dialect
from qcompile.kernels.lookup.levels import float_fields, levels
from qcompile.kernels.lookup.reference import lookup
from qcompile.kernels.quantize_float.reference import (
    float_scale,
    largest_level,
    quantize_float,
)

ONE = torch.ones(1)

TABLES = ("e4m3", "e5m2", "e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e1m6", "e5m0")

FLOAT8_TYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("table", TABLES)
def test_codes_are_those_that_lookup_decodes(table: str) -> None:
    exact = torch.tensor([value for value in levels(table) if math.isfinite(value)])
    codes = quantize_float(exact, ONE, table, 0)
    assert codes.dtype == torch.uint8
    assert torch.equal(lookup(codes, None, table, 0), exact)


@pytest.mark.parametrize("table", [table for table in TABLES if not table.endswith("m0")])
def test_halves_go_to_the_even_code(table: str) -> None:
    codes = quantize_float(_halves(table), ONE, table, 0)
    assert (codes % 2 == 0).all()


@pytest.mark.parametrize("table", ["e3m0", "e5m0"])
def test_halves_between_powers_of_two_go_up(table: str) -> None:
    halves = _halves(table)[1:]  # between 0 and the first power there are steps, as for integers
    values = lookup(quantize_float(halves, ONE, table, 0), None, table, 0)
    assert (values > halves).all()


@pytest.mark.parametrize("table", TABLES)
def test_no_other_level_is_nearer(table: str) -> None:
    x = 4 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    finite = torch.tensor([value for value in levels(table) if math.isfinite(value)])
    values = lookup(quantize_float(x, ONE, table, 0), None, table, 0)
    nearest = (x[:, None] - finite).abs().amin(1)
    assert torch.equal((x - values).abs(), nearest)


@pytest.mark.parametrize("table", FLOAT8_TYPES)
def test_codes_are_the_bits_of_torch_where_it_has_the_type(table: str) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)) ** 5
    codes = quantize_float(x, ONE, table, 0)
    largest = largest_level(table)
    of_torch = x.clamp(-largest, largest).to(FLOAT8_TYPES[table]).view(torch.uint8)
    assert torch.equal(codes, of_torch)


def test_values_beyond_the_largest_level_saturate() -> None:
    x = torch.tensor([500.0, -1e30, math.inf, -math.inf])
    values = lookup(quantize_float(x, ONE, "e4m3", 0), None, "e4m3", 0)
    assert values.tolist() == [448, -448, 448, -448]


@pytest.mark.parametrize("table", ["e2m1", "e3m0"])
def test_what_is_no_number_becomes_0_where_all_codes_are_numbers(table: str) -> None:
    assert quantize_float(torch.tensor([math.nan]), ONE, table, 0).tolist() == [0]


@pytest.mark.parametrize("table", FLOAT8_TYPES)
def test_what_is_no_number_stays_none(table: str) -> None:
    code = quantize_float(torch.tensor([math.nan]), ONE, table, 0)
    assert lookup(code, None, table, 0).isnan().all()


def test_scale_makes_the_largest_value_the_largest_level() -> None:
    x = torch.tensor([[-896.0, 1.0, 224.0], [0.0, 0.0, 0.0]])
    assert float_scale(x, "e4m3", 0).tolist() == [[2.0], [1.0]]
    assert float_scale(x[0], "e4m3", 2).tolist() == [2.0, 0.5]


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 40),
    group_size=st.sampled_from([0, 1, 16]),
    table=st.sampled_from(TABLES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_round_trip_errs_at_most_half_a_unit_of_the_mantissa(
    size: int, group_size: int, table: str, dtype: torch.dtype, seed: int
) -> None:
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    scale = dialect.float_scale(x, table, group_size)
    codes = dialect.quantize_float(x, scale, table, group_size)
    values = dialect.lookup(codes, scale, table, group_size)
    fields = float_fields(table)
    assert fields is not None
    unit = 2.0**-fields.mantissa_bits
    # Half a unit relative to the value, or of the subnormals'; a few roundings of float32 beside.
    per_value = scale.repeat_interleave(group_size or size, dim=-1)[..., :size]
    subnormal = per_value.double() * 2.0**fields.least_exponent
    bound = torch.maximum(x.abs().double(), subnormal) * unit / 2
    assert ((values.double() - x.double()).abs() <= bound * (1 + 1e-6)).all()


def test_other_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="'nf4' are no small floats, such as e2m1 or e4m3"):
        largest_level("nf4")


def _halves(table: str) -> torch.Tensor:
    """What lies halfway between neighbouring levels, from 0 up."""
    positive = sorted({value for value in levels(table) if math.isfinite(value) and value >= 0})
    return torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(positive)])
