"""The oracles of quantize, dequantize and dynamic_scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import infer_schema

from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.groups import group_count, split_groups, spread_groups
from qcompile.kernels.quantize.reference import dynamic_scale, quantize

# One rounding of x / scale, one of the product: a code may sit half a step plus two units of
# float32 in the ratio (at most 127 steps) away from its value.
HALF_STEP = 0.5 + 2 * 127 * torch.finfo(torch.float32).eps


def test_group_count_covers_short_last_group():
    assert [group_count(70, g) for g in (0, 16, 32, 70, 128)] == [1, 5, 3, 1, 1]


def test_split_groups_pads_last_group_with_zeros():
    groups = split_groups(torch.arange(1.0, 6.0), 3)
    assert groups.tolist() == [[1, 2, 3], [4, 5, 0]]


def test_spread_groups_repeats_values_and_cuts_last_group():
    assert spread_groups(torch.tensor([1, 2]), 5, 3).tolist() == [1, 1, 1, 2, 2]


def test_spread_groups_refuses_wrong_group_count():
    with pytest.raises(ValueError, match="3 groups given where 64 elements in groups of 32 make 2"):
        spread_groups(torch.ones(4, 3), 64, 32)


def test_dynamic_scale_is_absmax_over_127_per_token():
    x = torch.tensor([[1.0, -254.0, 3.0], [0.0, 0.0, 0.0]])
    assert dynamic_scale(x, 8, 0).tolist() == [[2.0], [1.0]]


def test_dynamic_scale_measures_each_group():
    x = torch.tensor([7.0, -1.0, 14.0, 3.0, -21.0])
    assert dynamic_scale(x, 4, 2).tolist() == [1.0, 2.0, 3.0]


def test_dynamic_scale_is_one_where_absmax_underflows():
    x = torch.full((1, 4), torch.finfo(torch.float32).smallest_normal * 2**-23)
    assert x[0, 0] > 0
    assert dynamic_scale(x, 8, 0).item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dynamic_scale_of_non_finite_group_stays_visible(bad):
    x = torch.tensor([1.0, bad, 1.0, 1.0])
    scale = dynamic_scale(x, 8, 2)
    values = dequantize(quantize(x, scale, None, 8, 2), scale, None, 8, 2)
    assert not values[:2].isfinite().any()
    assert values[2:].isfinite().all()


def test_quantize_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert quantize(x, torch.ones(1), None, 8, 0).tolist() == [0, 2, 2, 0, -2]


def test_quantize_symmetric_clamps_to_balanced_int8():
    codes = quantize(torch.tensor([-1000.0, 1000.0]), torch.ones(1), None, 8, 0)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [-127, 127]


def test_quantize_with_zero_point_gives_uint8_in_range():
    zero_point = torch.tensor([5], dtype=torch.uint8)
    codes = quantize(torch.tensor([-9.0, 0.0, 3.0, 99.0]), torch.ones(1), zero_point, 4, 0)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [0, 5, 8, 15]


@pytest.mark.parametrize("bits", [0, 1, 9])
def test_quantize_symmetric_refuses_bits_without_balanced_codes(bits):
    with pytest.raises(ValueError, match="2 to 8 bits"):
        quantize(torch.ones(2), torch.ones(1), None, bits, 0)


def test_dequantize_uint8_without_zero_point_centres_codes():
    codes = torch.tensor([[0, 8, 15]], dtype=torch.uint8)
    assert dequantize(codes, torch.tensor([[0.5]]), None, 4, 0).tolist() == [[-4.0, 0.0, 3.5]]


def test_dequantize_int8_codes_stand_for_themselves():
    codes = torch.tensor([[-127, 0, 1]], dtype=torch.int8)
    assert dequantize(codes, torch.tensor([2.0]), None, 8, 0).tolist() == [[-254.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("scale_dtype", "value_dtype"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dequantize_result_is_float32_unless_scale_is_float64(scale_dtype, value_dtype):
    codes = torch.zeros(1, 4, dtype=torch.uint8)
    scale = torch.ones(1, 1, dtype=scale_dtype)
    assert dequantize(codes, scale, None, 4, 0).dtype == value_dtype


def test_dequantize_of_activations_follows_float64_and_of_weights_rounds_as_they_do():
    scale = torch.tensor([[0.1]])  # a float32 whose multiples need more digits
    codes = torch.tensor([[7]], dtype=torch.int8)
    assert dequantize(codes, scale.double(), None, 8, 0).item() == 7 * scale.double().item()
    weights = codes.to(torch.uint8)
    zero = torch.zeros(1, 1, dtype=torch.uint8)
    wide = dequantize(weights, scale.double(), zero, 8, 0)
    assert torch.equal(wide, dequantize(weights, scale, zero, 8, 0).double())


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 70),
    group_size=st.sampled_from([0, 1, 16, 32, 64]),
    bits=st.integers(2, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_dynamic_round_trip_errs_at_most_half_a_step(size, group_size, bits, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, size, generator=generator).to(dtype)
    scale = dynamic_scale(x, bits, group_size)
    codes = quantize(x, scale, None, bits, group_size)
    values = dequantize(codes, scale, None, bits, group_size)
    step = spread_groups(scale, size, group_size)
    assert ((values - x).abs() / step).max() <= HALF_STEP


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(1, 8),
    group_size=st.sampled_from([0, 8, 16]),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 2**16),
)
def test_quantize_recovers_codes_of_dequantize(bits, group_size, scale_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(20, group_size)
    codes = torch.randint(0, 2**bits, (3, 20), generator=generator).to(torch.uint8)
    zero_point = torch.randint(0, 2**bits, (3, groups), generator=generator).to(torch.uint8)
    scale = (torch.rand(3, groups, generator=generator) + 0.01).to(scale_dtype)
    values = dequantize(codes, scale, zero_point, bits, group_size)
    assert torch.equal(quantize(values, scale, zero_point, bits, group_size), codes)


def test_ops_have_schemas_that_torch_library_accepts():
    schema = (
        "(Tensor x, Tensor scale, Tensor? zero_point, SymInt bits, SymInt group_size) -> Tensor"
    )
    assert infer_schema(quantize, mutates_args=()) == schema
    assert infer_schema(dequantize, mutates_args=()) == schema.replace("x,", "codes,")
    assert "SymInt bits" in infer_schema(dynamic_scale, mutates_args=())


@pytest.mark.parametrize("group_size", [0, 16, 32])
def test_ops_accept_symbolic_leading_dimensions(group_size):
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env) as mode:
        real = torch.empty(2, 5, 40)
        x = mode.from_tensor(
            real,
            symbolic_context=_leading_dims_dynamic(),
        )
        scale = dynamic_scale(x, 8, group_size)
        codes = quantize(x, scale, None, 8, group_size)
        values = dequantize(codes, scale, None, 8, group_size)
    assert values.shape == x.shape
    assert scale.shape[-1] == group_count(40, group_size)
    assert not shape_env.guards, "no assumption about the leading dimensions"


def _leading_dims_dynamic():
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    return StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    )
