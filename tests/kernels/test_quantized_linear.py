"""The packed layout, and the oracles over it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.groups import group_count
from qcompile.kernels.quantized_linear.layout import (
    container_bits,
    pack_codes,
    packed_shape,
    unpack_codes,
)
from qcompile.kernels.quantized_linear.reference import quantized_embedding, quantized_linear


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 300), bits=st.integers(1, 8))
def test_codes_survive_packing(n: int, k: int, bits: int) -> None:
    original = codes(n, k, bits)
    packed = pack_codes(original, bits)
    assert packed.shape == packed_shape(n, k, bits)
    assert packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, k, bits), original)


def test_byte_holds_columns_that_stand_a_part_apart() -> None:
    original = (torch.arange(128) % 16).to(torch.uint8).reshape(1, 128)
    packed = pack_codes(original, 4)
    assert packed.shape == (2, 1, 32)
    # Byte 3 of block 1: columns 64 + 3 and 64 + 32 + 3, the first in the low bits.
    assert packed[1, 0, 3] == original[0, 67] | original[0, 99] << 4


@pytest.mark.parametrize(
    ("bits", "container"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (6, 8), (7, 8), (8, 8)]
)
def test_code_takes_the_narrowest_container(bits: int, container: int) -> None:
    assert container_bits(bits) == container
    blocks, n, row_bytes = packed_shape(5, 1024, bits)
    assert blocks * n * row_bytes == 5 * 1024 * container // 8


@pytest.mark.parametrize("bits", [0, 9])
def test_width_out_of_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"not {bits}"):
        container_bits(bits)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [0, 16, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_oracles_are_dequantize_and_the_plain_operators(
    dtype: torch.dtype, group_size: int, zeros: bool
) -> None:
    torch.manual_seed(0)
    n, k, bits = 7, 70, 4
    groups = group_count(k, group_size)
    stored = codes(n, k, bits)
    scale = torch.rand(n, groups, dtype=dtype)
    zero = codes(n, groups, bits) if zeros else None
    bias = torch.randn(n, dtype=dtype)
    x = torch.randn(2, 3, k, dtype=dtype)
    weight = dequantize(stored, scale, zero, bits, group_size)
    packed = (pack_codes(stored, bits), scale.t(), None if zero is None else zero.t())
    expected = torch.nn.functional.linear(x, weight, bias)
    found = quantized_linear(x, *packed, bias, k, bits, group_size, "none")
    assert torch.equal(found, expected)
    ids = torch.tensor([[0, 6, 3], [3, 1, 1]])
    found = quantized_embedding(ids, *packed, k, bits, group_size)
    assert torch.equal(found, weight[ids])


def test_rounding_rounds_both_operands_and_sums_in_float32() -> None:
    torch.manual_seed(0)
    stored, scale, x = codes(5, 64, 8), torch.rand(1, 5), torch.randn(3, 64)
    weight = dequantize(stored, scale.t(), None, 8, 0)
    found = quantized_linear(x, pack_codes(stored, 8), scale, None, None, 64, 8, 0, "bfloat16")
    expected = x.bfloat16().float() @ weight.bfloat16().float().t()
    # The same products in another order, with sums of about 1e3.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert not torch.allclose(found, x @ weight.t(), rtol=0, atol=1e-2)


def test_rounding_saturates_and_keeps_what_is_no_number() -> None:
    packed, scale = pack_codes(torch.full((1, 1), 9, dtype=torch.uint8), 4), torch.ones(1, 1)
    x = torch.tensor([[1e6], [-1e6], [float("nan")]])
    found = quantized_linear(x, packed, scale, None, None, 1, 4, 0, "float16")
    assert found[:2, 0].tolist() == [65504.0, -65504.0]
    assert found[2, 0].isnan()
