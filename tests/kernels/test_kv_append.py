"""What caches of few bits keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.ir import dialect
from qcompile.kernels.kv_append.rows import CACHE_FORMATS, decode_rows, encode_rows, row_bytes


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales_of(x: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """The range of each number's group over its codes, by the definition."""
    size = group_size or x.shape[-1]
    parts = [
        (part.amax(-1).clamp(min=0) - part.amin(-1).clamp(max=0)).unsqueeze(-1).expand(part.shape)
        for part in x.split(size, dim=-1)
    ]
    scales: torch.Tensor = torch.cat(parts, dim=-1) / (2**bits - 1)
    return scales


@pytest.mark.parametrize("group_size", [0, 8, 24, 32])
@pytest.mark.parametrize("width", [5, 16, 64, 80])
@pytest.mark.parametrize(("format", "bits"), [("int8", 8), ("int4", 4)])
def test_integer_rows_err_by_at_most_half_a_step(
    format: str, bits: int, width: int, group_size: int
) -> None:
    x = gaussian(3, 2, 7, width) + 0.5
    rows = encode_rows(x, format, group_size)
    assert rows.dtype == torch.uint8
    assert rows.shape == (3, 2, 7, row_bytes(width, format, group_size))
    error = (decode_rows(rows, format, group_size, width) - x).abs()
    # Half a step by rounding; at the ends, another half where the zero point was rounded; and the
    # scale itself is a float16: 2^-11 of the range, 2^bits steps.
    limit = scales_of(x, bits, group_size) * (1 + 2.0 ** (bits - 11))
    assert (error <= limit).all()
    inside = error <= 0.5 * scales_of(x, bits, group_size) * (1 + 2.0**-10)
    assert inside.float().mean() > 0.9


def test_bf16_rows_are_the_rounded_numbers() -> None:
    x = gaussian(2, 3, 4, 6)
    rows = encode_rows(x, "bf16", 0)
    assert rows.shape[-1] == row_bytes(6, "bf16", 0) == 12
    assert torch.equal(decode_rows(rows, "bf16", 0, 6), x.to(torch.bfloat16).float())


def test_int4_row_is_codes_by_halves_then_scales_then_zero_points() -> None:
    # Two groups of four: codes 0..15 over [0, 15], and over [-15, 0].
    x = torch.tensor([[0.0, 1, 2, 15, -15, -14, -1, 0]])
    row = encode_rows(x, "int4", 4)[0].numpy()
    low, high = [0, 1, 2, 15], [0, 1, 14, 15]
    codes = [a | b << 4 for a, b in zip(low, high, strict=True)]
    assert row[:4].tolist() == codes
    assert row[4:8].view(np.float16).tolist() == [1.0, 1.0]
    assert row[8:].tolist() == [0, 15]


@pytest.mark.parametrize("format", CACHE_FORMATS)
def test_zeros_are_kept_and_equal_numbers_to_the_precision_of_a_scale(format: str) -> None:
    for value in (0.0, 1.0, -2.0):
        x = torch.full((1, 2, 3, 16), value)
        kept = decode_rows(encode_rows(x, format, 0), format, 0, 16)
        assert (kept - x).abs().max() <= abs(value) * 2.0**-11


@pytest.mark.parametrize("format", CACHE_FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(format: str, bad: float) -> None:
    x = gaussian(2, 1, 1, 16)
    x[0, 0, 0, 3] = bad
    decoded = decode_rows(encode_rows(x, format, 0), format, 0, 16)
    assert not decoded[0].isfinite().all()
    assert decoded[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_append_rounds_what_is_new_and_keeps_the_past(dtype: torch.dtype) -> None:
    past, new = gaussian(2, 3, 4, 16).to(dtype), gaussian(2, 3, 2, 16, seed=1).to(dtype)
    grown = dialect.kv_append(past, new, "int4", 8)
    assert grown.dtype == dtype
    assert torch.equal(grown[:, :, :4], past)
    rounded = decode_rows(encode_rows(new, "int4", 8), "int4", 8, 16)
    assert torch.equal(grown[:, :, 4:], rounded.to(dtype))


def test_encoded_appends_hold_what_an_append_gives() -> None:
    new, past = gaussian(1, 2, 3, 16), gaussian(1, 2, 5, 16, seed=2)
    rows = torch.cat([dialect.kv_encode(x, "int8", 0) for x in (past, new)], dim=2)
    kept = dialect.kv_decode(dialect.kv_encode(past, "int8", 0), "int8", 0, 16)
    assert torch.equal(
        dialect.kv_decode(rows, "int8", 0, 16), dialect.kv_append(kept, new, "int8", 0)
    )


def test_unknown_formats_are_named() -> None:
    with pytest.raises(ValueError, match="unknown cache format 'int3'; known: bf16, int8, int4"):
        row_bytes(16, "int3", 0)
