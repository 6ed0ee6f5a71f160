import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import ModelError, RecipeError
from qcompile.formats import GroupParameters, LookupFormat, QuantizedWeight, parse_format, rtn
from qcompile.formats.nearest_level import NearestLevel
from qcompile.formats.scales import SCALE_STORAGES
from qcompile.kernels.lookup.levels import levels, spell_levels

TABLES = ["ternary", "nf4", "e2m1", "e3m0", "e4m3", "e5m2", "e2m3", "(-2,-0.5,0.25,1)", "(-1,1)"]

formats = st.builds(
    LookupFormat,
    table=st.sampled_from(TABLES),
    group_size=st.sampled_from([0, 1, 16, 24, 64]),
    scales=st.sampled_from(list(SCALE_STORAGES.values())),
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded_in_float64(format, quantized):
    """Decoding written a second time, element by element in numpy."""
    tensors = {name: tensor.double().numpy() for name, tensor in quantized.tensors.items()}
    scale = tensors["scale"]
    if quantized.tensors["scale"].dtype == torch.uint8:
        table = np.array(levels({"dq": "uint8"}.get(format.scales.name, format.scales.name)))
        scale = table[scale.astype(int)] * tensors.get("outer_scale", np.ones((1, 1)))
    values = np.array(format.levels)[tensors["codes"].astype(int)]
    for column in range(values.shape[1]):
        group = column // format.group_size if format.group_size else 0
        values[:, column] *= scale[:, group]
    return values


@settings(max_examples=80, deadline=None)
@given(format=formats, columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_decode_is_level_times_scale(format, columns, seed):
    quantized = format.encode(normal(3, columns, seed=seed))
    decoded = format.decode(quantized)
    assert decoded.dtype == torch.float32
    # One rounding of an outer product and one of the value.
    np.testing.assert_allclose(decoded, decoded_in_float64(format, quantized), rtol=2**-22)


@settings(max_examples=80, deadline=None)
@given(format=formats, columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_encode_gives_the_tensors_that_the_format_declares(format, columns, seed):
    quantized = format.encode(normal(3, columns, seed=seed))
    declared = format.tensors((3, columns))
    assert {name: (tuple(t.shape), t.dtype) for name, t in quantized.tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in declared.items()
    }
    assert int(quantized.tensors["codes"].max()) < len(format.levels)


@settings(max_examples=80, deadline=None)
@given(
    format=formats,
    columns=st.integers(1, 70),
    search=st.sampled_from(["absmax", "mse", "l2.4"]),
    seed=st.integers(0, 999),
)
def test_encode_chooses_the_nearest_level(format, columns, search, seed):
    weight = normal(3, columns, seed=seed)
    quantized = format.encode(weight, scale_search=search)
    error = (format.decode(quantized) - weight).abs()
    for code, level in enumerate(format.levels):
        if math.isfinite(level):
            codes = torch.full_like(quantized.tensors["codes"], code)
            other = QuantizedWeight(format, quantized.shape, {**quantized.tensors, "codes": codes})
            # A tie may fall either way once w / scale is rounded to float32.
            bound = (format.decode(other) - weight).abs() + 1e-6 * weight.abs().max()
            assert (error <= bound).all()


@settings(max_examples=80, deadline=None)
@given(format=formats)
def test_name_reads_back_as_the_same_format(format):
    assert parse_format(str(format)) == format


@pytest.mark.parametrize(
    ("text", "table", "group_size", "scales"),
    [
        ("ternary-g64", "ternary", 64, "fp16"),
        ("NF4-g64-dq", "nf4", 64, "dq"),
        ("fp8", "e4m3", 0, "fp32"),
        ("fp8-bf16-g128", "e4m3", 128, "bf16"),
        ("fp4-g32-e8m0", "e2m1", 32, "e8m0"),
        ("mxfp4", "e2m1", 32, "e8m0"),
        ("nvfp4", "e2m1", 16, "e4m3"),
        ("e3m0-g32", "e3m0", 32, "fp16"),
        ("(-1.5, -0.5, 0.5, 1.5)-g16", "(-1.5,-0.5,0.5,1.5)", 16, "fp16"),
    ],
)
def test_names_mean(text, table, group_size, scales):
    assert parse_format(text) == LookupFormat(table, group_size, SCALE_STORAGES[scales])


@pytest.mark.parametrize(
    ("text", "name"),
    [("e2m1-g32-e8m0", "mxfp4"), ("e4m3-fp32", "fp8"), ("nf4-fp16-g64", "nf4-g64")],
)
def test_canonical_name(text, name):
    assert str(parse_format(text)) == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nf3", "did you mean 'nf4'"),
        ("mxpf4", "did you mean 'mxfp4'"),
        ("mxfp4-g64", "part of the standard"),
        ("nf4-asym", "cannot use 'asym'"),
        ("int4-dq", "cannot use 'dq'"),
        ("nf4-g64-g64", "once"),
        ("e5m5", "unknown format"),
        ("(1,1)", "different levels"),
        ("(1,nan)", "finite numbers"),
        ("(1,1e39)", "finite numbers"),
        ("(1,a)", "no list of numbers"),
        ("(1", "2 to 256 different levels"),
    ],
)
def test_parse_format_error_says_what_to_write(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_format(text)


def test_spelled_levels_read_back_as_float32():
    numbers = [float(x) for x in normal(16)]
    assert levels(spell_levels(numbers)) == tuple(numbers)
    assert str(parse_format("(0.10, -2e-1)-g16")) == "(0.1,-0.2)-g16"


def test_nf4_is_the_published_table():
    # Dettmers et al., 2023, appendix E, computed there in float32.
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0]
    published += [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]
    np.testing.assert_allclose(levels("nf4"), published, atol=1e-6)


@pytest.mark.parametrize(
    ("table", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_small_floats_are_those_of_torch(table, dtype):
    of_torch = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    ours = torch.tensor(levels(table))
    assert torch.equal(ours.nan_to_num(nan=1e9), of_torch.nan_to_num(nan=1e9))


def test_powers_of_two_are_those_of_torch():
    of_torch = torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(torch.tensor(levels("e8m0")[:255]), of_torch)


@settings(max_examples=100, deadline=None)
@given(
    table=st.sampled_from([*TABLES, "uint8"]),
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20),
)
def test_nearest_level_is_the_nearest(table, values):
    nearest = NearestLevel(table)
    x = torch.tensor(values, dtype=torch.float32)
    found = nearest.round(x).double()
    finite = torch.tensor([v for v in levels(table) if math.isfinite(v)], dtype=torch.float64)
    distances = (x.double().unsqueeze(1) - finite).abs()
    least = distances.amin(dim=1)
    # Boundaries are rounded to float32: halfway between levels either may be chosen.
    distance = (x.double() - found).abs()
    near = (distance <= least) | (distance - least <= 2.0**-22 * (1 + x.double().abs()))
    assert near[x.isfinite()].all()
    assert torch.equal(torch.tensor(levels(table))[nearest.codes(x).int()].double(), found)


@pytest.mark.parametrize("name", ["nf4-g64", "fp4-g64", "ternary-g64", "fp8", "nvfp4"])
def test_searches_lower_the_error(name):
    weight = normal(64, 256)
    plain, mse = (rtn(weight, parse_format(name), scale_search=s) for s in ("absmax", "mse"))
    assert mse.relative_error < plain.relative_error


def test_nf4_beats_integers_on_normal_weights_and_double_quantization_costs_little():
    weight = normal(64, 1024)
    errors = {
        name: rtn(weight, parse_format(name)).relative_error
        for name in ("int4-g64", "nf4-g64", "nf4-g64-dq", "mxfp4", "nvfp4")
    }
    assert errors["nf4-g64"] < errors["int4-g64"]
    assert abs(errors["nf4-g64-dq"] / errors["nf4-g64"] - 1) < 0.02
    assert errors["nvfp4"] < errors["mxfp4"]


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("nf4-g64", 4 + 16 / 64),
        ("nf4-g64-dq", 4 + 8 / 64 + 32 / 320),
        ("fp8", 8 + 32 / 320),
        ("mxfp4", 4 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / (40 * 320)),
        ("ternary-g64", 8 / 5 + 16 / 64),
        ("(-1.5,-0.5,0.5,1.5)-g64", 2 + 16 / 64 + 4 * 32 / (40 * 320)),
    ],
)
def test_bits_are_counted_exactly(name, bits):
    assert parse_format(name).bits_per_weight((40, 320)) == pytest.approx(bits, rel=1e-12)


def test_mx_scale_is_the_better_power_of_two():
    # max|w| = 7: a scale of 1 clips it to 6, a scale of 2 rounds the others coarsely.
    quantized = parse_format("mxfp4").encode(torch.tensor([[7.0, 0.5, 1.5, -1.0]]))
    assert parse_format("mxfp4").decode(quantized).tolist() == [[6.0, 0.5, 1.5, -1.0]]


@pytest.mark.parametrize("name", ["nf4-g16", "nvfp4", "mxfp4", "(-1,1)-g16", "nf4-g16-dq"])
def test_group_of_zeros_decodes_to_next_to_nothing(name):
    weight = torch.zeros(2, 64)
    weight[0, 32:] = normal(32)
    format = parse_format(name)
    decoded = format.decode(format.encode(weight))
    # Without a level 0 only a small scale can say so: float16 ends at 2^-24.
    bound = 2**-24 if "(" in name else 0
    assert decoded[weight == 0].abs().max() <= bound


def test_rows_of_a_weight_decode_alone():
    for name in ("nvfp4", "nf4-g16-dq"):
        format = parse_format(name)
        quantized = format.encode(normal(6, 40))
        part = format.rows(quantized, 2, 5)
        assert torch.equal(format.decode(part), format.decode(quantized)[2:5])


def test_stacks_are_stored_matrix_by_matrix():
    weight = normal(2, 5, 48)
    for name in ("nvfp4", "nf4-g16-dq"):
        format = parse_format(name)
        whole = format.encode(weight)
        apart = [format.decode(format.encode(matrix)) for matrix in weight]
        assert torch.equal(format.decode(whole), torch.stack(apart))
        assert {n: tuple(t.shape) for n, t in whole.tensors.items()} == {
            n: spec.shape for n, spec in format.tensors((2, 5, 48)).items()
        }


def test_not_finite_and_too_large_weights_are_refused():
    weight = normal(2, 32)
    weight[1, 3] = torch.nan
    for name in ("nf4-g16", "nvfp4"):
        with pytest.raises(ModelError, match="weight 'w' contains NaN"):
            parse_format(name).encode(weight, name="w")
    with pytest.raises(ModelError, match="'w' needs a scale"):
        parse_format("nf4").encode(torch.full((1, 16), 1e6), name="w")


@pytest.mark.parametrize(
    "name", ["int4-g16", "int3-g16-asym", "nf4-g16", "fp8", "ternary-g16", "nvfp4", "nf4-g16-dq"]
)
def test_grid_column_by_column_equals_encode(name):
    # What a sweep does, without the error that it compensates.
    format, weight = parse_format(name), normal(6, 40)
    grid = format.grid.bind(weight)
    width = format.group_size or weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    decoded = torch.empty_like(weight)
    fitted = []
    for start in range(0, weight.shape[1], width):
        columns = range(start, min(start + width, weight.shape[1]))
        fitted.append(grid.fit(weight[:, columns.start : columns.stop], "mse"))
        for column in columns:
            chosen = grid.nearest(weight[:, column : column + 1], fitted[-1])
            codes[:, column] = chosen.squeeze(1)
            decoded[:, column] = grid.decode(chosen, fitted[-1]).squeeze(1)
    tensors = grid.store(codes, GroupParameters.join(fitted))
    expected = format.encode(weight, scale_search="mse")
    assert set(tensors) == set(expected.tensors)
    for part, tensor in expected.tensors.items():
        assert torch.equal(tensors[part], tensor)
    assert torch.equal(format.decode(expected), decoded)


def test_importance_moves_the_scale_towards_what_matters():
    weight = torch.tensor([[8.0, 1.0, 1.1, 0.9, -1.0, 1.05, 0.95, -1.1]])
    importance = torch.tensor([[1e-6, 1, 1, 1, 1, 1, 1, 1]])
    grid = parse_format("int3-fp32").grid
    plain, weighted = grid.fit(weight, "mse"), grid.fit(weight, "mse", importance=importance)
    assert weighted.scale.abs() < plain.scale.abs()


def test_unbound_grid_says_that_it_needs_a_weight():
    with pytest.raises(ValueError, match="bind the grid"):
        parse_format("nvfp4").grid.fit(normal(2, 16))
