import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import ModelError
from qcompile.formats import (
    IntegerFormat,
    QuantizedWeight,
    parse_format,
    relative_error,
    row_blocks,
    rtn,
)

formats = st.builds(
    IntegerFormat,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([0, 1, 16, 24, 32, 64]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
) | st.builds(
    IntegerFormat,
    bits=st.integers(1, 8),
    group_size=st.sampled_from([0, 16, 24, 64]),
    symmetric=st.just(False),
    zero_dtype=st.just(torch.float16),
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decoded_in_float64(format, quantized):
    """Decoding written a second time, element by element in numpy."""
    codes = quantized.tensors["codes"].numpy().astype(np.float64)
    scale = quantized.tensors["scale"].double().numpy()
    zero = quantized.tensors.get("zero_point")
    zero = np.full(scale.shape, 2.0 ** (format.bits - 1)) if zero is None else zero.numpy()
    values = np.empty_like(codes)
    for column in range(codes.shape[1]):
        group = column // format.group_size if format.group_size else 0
        values[:, column] = (codes[:, column] - zero[:, group]) * scale[:, group]
    return values


@settings(max_examples=60, deadline=None)
@given(format=formats, columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_decode_is_code_minus_zero_point_times_scale(format, columns, seed):
    quantized = format.encode(normal(3, columns, seed=seed))
    decoded = format.decode(quantized)
    assert decoded.dtype == torch.float32
    # (code - zero) is exact and the product is rounded once to float32.
    np.testing.assert_allclose(decoded, decoded_in_float64(format, quantized), rtol=2**-24)


@settings(max_examples=60, deadline=None)
@given(format=formats, columns=st.integers(1, 70), seed=st.integers(0, 999))
def test_encode_gives_the_tensors_that_the_format_declares(format, columns, seed):
    quantized = format.encode(normal(3, columns, seed=seed))
    declared = format.tensors((3, columns))
    assert {name: (tuple(t.shape), t.dtype) for name, t in quantized.tensors.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in declared.items()
    }
    assert int(quantized.tensors["codes"].max()) < 2**format.bits


@settings(max_examples=60, deadline=None)
@given(
    format=formats,
    columns=st.integers(1, 70),
    search=st.sampled_from(["absmax", "mse"]),
    seed=st.integers(0, 999),
)
def test_encode_chooses_the_nearest_code(format, columns, search, seed):
    weight = normal(3, columns, seed=seed)
    quantized = format.encode(weight, scale_search=search)
    error = (format.decode(quantized) - weight).abs()
    codes = quantized.tensors["codes"].int()
    for neighbour in (codes - 1, codes + 1):
        neighbour = neighbour.clamp(0, 2**format.bits - 1).to(torch.uint8)
        moved = QuantizedWeight(format, quantized.shape, {**quantized.tensors, "codes": neighbour})
        other = (format.decode(moved) - weight).abs()
        # A tie may fall either way once w / scale is rounded to float32.
        assert (error <= other + 1e-6 * weight.abs().max()).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("search", ["absmax", "mse"])
def test_asymmetric_error_is_at_most_one_step_of_the_range(bits, search):
    weight = normal(8, 64)
    format = IntegerFormat(bits, 16, symmetric=False, scale_dtype=torch.float32)
    error = (format.decode(format.encode(weight)) - weight).abs().reshape(8, 4, 16)
    groups = weight.reshape(8, 4, 16)
    spread = groups.amax(-1).clamp_min(0) - groups.amin(-1).clamp_max(0)
    # Half a step from rounding the code and half from rounding the zero point.
    assert (error.amax(-1) <= spread / (2**bits - 1) * 1.0001).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shift", [-100.0, -3.0, 0.0, 30.0])
def test_float_zero_points_err_by_half_a_step_wherever_the_group_lies(bits, shift):
    weight = normal(8, 64) + shift
    format = IntegerFormat(bits, 16, False, torch.float16, torch.float16)
    error = (format.decode(format.encode(weight)) - weight).abs().reshape(8, 4, 16).amax(-1)
    groups = weight.reshape(8, 4, 16)
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    # Half a step, and what 11 bits of scale and zero point take from where the group lies.
    assert bool((error <= 0.5 * step + 2**-9 * groups.abs().amax(-1)).all())


def test_float_zero_points_of_groups_too_far_from_0_for_their_type_include_it():
    weight = torch.full((1, 16), 1000.0)
    weight[0, 0] = 1000.5
    format = IntegerFormat(8, 16, False, torch.float16, torch.float16)
    quantized = format.encode(weight)
    assert quantized.tensors["zero_point"].tolist() == [[0.0]]
    assert rtn(weight, format).relative_error < 2**-9


@pytest.mark.parametrize("bits", range(1, 9))
def test_float_zero_points_decode_with_one_rounding(bits):
    # Between codes of 8 bits and zero points down to 2^-12 there are less than 24 bits.
    weight = normal(16, 64).abs()  # zero points next to 0
    format = IntegerFormat(bits, 16, False, torch.float16, torch.float16)
    tensors = format.encode(weight).tensors
    zero = tensors["zero_point"]
    assert torch.equal(zero.double() * 2**12, (zero.double() * 2**12).round())
    steps = tensors["codes"].double().reshape(16, 4, 16) - zero.double().unsqueeze(-1)
    assert torch.equal(steps.float().double(), steps)


def test_float_zero_points_take_16_bits():
    format = parse_format("int4-g64-asym16")
    parts = format.bits_by_part((8, 128))
    assert parts == {"codes": 8 * 128 * 4, "scale": 16 * 16, "zero_point": 16 * 16}


def test_symmetric_scale_uses_the_extra_level_where_it_lowers_the_error():
    format = parse_format("int4-fp32")
    lopsided = torch.tensor([[8.0, -7.0, 3.0, 1.0], [7.0, -7.0, 3.0, 1.0]])
    quantized = format.encode(lopsided)
    assert quantized.tensors["scale"].tolist() == [[-1.0], [1.0]]
    assert torch.equal(format.decode(quantized), lopsided)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_encode_is_no_worse_than_absmax_alone_in_any_group(bits):
    weight = normal(64, 32)
    format = IntegerFormat(bits, 32, scale_dtype=torch.float32)
    largest = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True) / largest
    absmax = torch.round(weight / scale).clamp(-largest - 1, largest) * scale
    absmax_error = (absmax - weight).square().sum(-1)
    error = (format.decode(format.encode(weight)) - weight).square().sum(-1)
    assert (error <= absmax_error * (1 + 1e-6)).all()  # float32 sums of 32 squares
    assert error.sum() < 0.98 * absmax_error.sum()


@pytest.mark.parametrize("text", ["int2-g32", "int3-g32-asym", "int4-g64", "int4-g64-asym", "int8"])
def test_mse_search_is_no_worse_than_absmax(text):
    weight = normal(32, 128)
    format = parse_format(text)
    plain = rtn(weight, format).relative_error
    searched = rtn(weight, format, scale_search="mse").relative_error
    assert searched <= plain
    if format.bits < 8:
        assert searched < 0.98 * plain  # clipping the tails of a bell shape pays


def test_relative_error_is_the_frobenius_ratio():
    weight = normal(600, 700)  # more than one block of rows
    result = rtn(weight, parse_format("int4-g64"))
    decoded = result.weight.format.decode(result.weight)
    expected = float((decoded - weight).double().norm() / weight.double().norm())
    assert result.relative_error == pytest.approx(expected, rel=1e-9)
    assert 0.08 < result.relative_error < 0.12  # what 4 bits give on normal weights


@pytest.mark.parametrize("text", ["int4-g16", "int4-g16-asym", "int1-g16-asym", "int8-bf16"])
def test_group_of_zeros_decodes_to_zeros(text):
    weight = torch.zeros(2, 32)
    weight[0, 16:] = normal(16)
    quantized = parse_format(text).encode(weight, scale_search="mse")
    decoded = quantized.format.decode(quantized)
    assert torch.equal(decoded[weight == 0], torch.zeros(48))
    assert relative_error(torch.zeros(2, 32), parse_format(text).encode(torch.zeros(2, 32))) == 0


@pytest.mark.parametrize("value", [0.5, -0.5])
@pytest.mark.parametrize("text", ["int1-asym", "int2", "int4", "int4-asym", "int8"])
def test_constant_group_is_kept_to_the_precision_of_its_scale(value, text):
    weight = torch.full((1, 16), value)
    quantized = parse_format(text).encode(weight)
    error = (quantized.format.decode(quantized) - weight).abs().max()
    assert error <= abs(value) * 2**-11  # half a unit of float16


def test_bfloat16_weight_is_read_without_a_copy_of_it_all():
    weight = normal(4, 64).bfloat16()
    direct = parse_format("int4-g32").encode(weight)
    widened = parse_format("int4-g32").encode(weight.float())
    assert torch.equal(direct.tensors["codes"], widened.tensors["codes"])


@pytest.mark.parametrize("text", ["int4-g16", "int4-g16-asym"])
def test_scale_that_underflows_is_the_smallest_number_not_zero(text):
    quantized = parse_format(text).encode(torch.full((1, 16), 1e-9))
    scale = quantized.tensors["scale"]
    assert (scale.abs() == 2.0**-24).all()  # the smallest float16
    assert torch.equal(quantized.format.decode(quantized), torch.zeros(1, 16))
    assert relative_error(torch.full((1, 16), 1e-9), quantized) == 1.0


def test_subnormal_scale_keeps_small_weights():
    weight = normal(4, 64) * 1e-5
    assert rtn(weight, parse_format("int8")).relative_error < 0.15
    assert rtn(weight, parse_format("int8-fp32")).relative_error < 0.01


@pytest.mark.parametrize("text", ["int4-g16", "int4-g16-asym"])
def test_scale_that_overflows_names_the_layer_and_the_remedy(text):
    weight = torch.full((1, 16), 1e6)
    with pytest.raises(ModelError, match=r"'layers\.0\.q'.*float16 ends at 65504") as caught:
        parse_format(text).encode(weight, name="layers.0.q")
    assert "-bf16" in caught.value.remedy
    assert rtn(weight, parse_format(text + "-bf16")).relative_error < 0.01


@pytest.mark.parametrize("text", ["int4", "int4-asym", "int8-fp32"])
def test_widest_float32_range_needs_no_wider_arithmetic(text):
    top = torch.finfo(torch.float32).max
    weight = torch.tensor([[-top, top, 0.0, top / 2]])
    format = parse_format(text.removesuffix("-fp32") + "-fp32")
    assert rtn(weight * 0.9, format).relative_error < 0.2


@pytest.mark.parametrize(
    ("bad", "kind"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_weight_that_is_not_finite_names_the_layer(bad, kind):
    weight = normal(4, 16)
    weight[2, 3] = bad
    with pytest.raises(ModelError, match=rf"'layers\.7\.up' contains {kind}"):
        parse_format("int4-g16").encode(weight, name="layers.7.up")


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_of_rows_and_threads_change_nothing(monkeypatch, threads):
    weight = normal(37, 50)
    format = parse_format("int3-g16-asym")
    whole = rtn(weight, format, scale_search="mse")
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 120)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = rtn(weight, format, scale_search="mse")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, tensor in whole.weight.tensors.items():
        assert torch.equal(tensor, parts.weight.tensors[name])
    # Float64 sums in other orders.
    assert parts.relative_error == pytest.approx(whole.relative_error, rel=1e-12)


def test_encode_keeps_leading_dimensions():
    weight = normal(2, 3, 20)
    format = parse_format("int4-g16-asym")
    quantized = format.encode(weight)
    flat = format.encode(weight.reshape(6, 20))
    assert quantized.tensors["scale"].shape == (2, 3, 2)
    assert torch.equal(format.decode(quantized).reshape(6, 20), format.decode(flat))


@pytest.mark.parametrize(
    ("text", "shape", "bits"),
    [
        ("int4-g64", (576, 576), 4 + 16 / 64),
        ("int4-g32-asym", (64, 64), 4 + 16 / 32 + 4 / 32),
        ("int4-g32-asym-fp32", (64, 64), 4 + 32 / 32 + 4 / 32),
        ("int8", (10, 100), 8 + 16 / 100),
        ("int3-g64", (5, 70), 3 + 2 * 16 / 70),  # a short last group costs a whole scale
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(text, shape, bits):
    format = parse_format(text)
    assert format.bits_per_weight(shape) == pytest.approx(bits, abs=1e-12)
    assert format.stored_bits(shape) == round(bits * math.prod(shape))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("search", ["mse", "l2.4"])
def test_zero_points_never_make_a_group_err_more(bits, search):
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(bits)) ** 3
    exponent = 2 if search == "mse" else 2.4
    errors = []
    for symmetry in ("sym", "asym"):
        format = parse_format(f"int{bits}-g24-{symmetry}-fp32")
        decoded = format.decode(format.encode(weight, scale_search=search))
        errors.append((decoded - weight).abs().pow(exponent).reshape(64, 2, 24).sum(-1))
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())  # the same sums, rounded in float32
