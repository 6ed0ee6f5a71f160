"""QEmbedding: rows of the same packed bytes that QLinear multiplies with."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from qcompile.kernels.cpu.layout import PACKABLE_BITS, SCALE_DTYPES, pack_linear

N, K, GROUP = 37, 75, 32


Zeros = Literal["uint8", "float16"] | None


def make_table(bits: int, zeros: Zeros, scale_dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The packed table, and its rows in float32."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << bits, (N, K), dtype=np.uint8)
    scale = rng.integers(1, 128, (N, 3)).astype(np.float32) / 512  # exact in every type
    zero = rng.integers(0, 1 << bits, (N, 3)).astype(zeros) if zeros else None
    if zeros == "float16":
        zero += rng.integers(0, 8, (N, 3)).astype(np.float16) / 8
    packed = pack_linear(codes, scale, zero, bits=bits, group_size=GROUP, scale_dtype=scale_dtype)
    offset = np.full((N, 3), 1 << (bits - 1)) if zero is None else zero.astype(np.float64)
    rows = codes - np.repeat(offset, GROUP, axis=1)[:, :K]
    return packed, (rows * np.repeat(scale, GROUP, axis=1)[:, :K]).astype(np.float32)


def attributes(bits: int, zeros: Zeros, scale_dtype: str) -> dict[str, int]:
    return {
        "N": N,
        "K": K,
        "bits": bits,
        "group_size": GROUP,
        "has_zero_point": int(zeros is not None),
        "float_zero_point": int(zeros == "float16"),
        "scale_dtype": SCALE_DTYPES.index(scale_dtype),
    }


@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("zeros", [None, "uint8", "float16"])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES[:3])
def test_rows_are_exact(run_node, bits, zeros, scale_dtype) -> None:
    packed, table = make_table(bits, zeros, scale_dtype)
    ids = np.array([[0, 36, 5], [16, 15, 5]], np.int64)
    (y,) = run_node("QEmbedding", [ids, packed], **attributes(bits, zeros, scale_dtype))
    np.testing.assert_array_equal(y, table[ids])


def test_subnormal_half_scales_are_read(run_node) -> None:
    scale = np.full((1, 1), 2.0**-24, np.float32)  # the smallest float16
    packed = pack_linear(np.full((1, 16), 12, np.uint8), scale, bits=4, group_size=0)
    (y,) = run_node(
        "QEmbedding",
        [np.zeros(1, np.int64), packed],
        N=1,
        K=16,
        bits=4,
        group_size=0,
        scale_dtype=1,
    )
    np.testing.assert_array_equal(y, np.full((1, 16), 4 * 2.0**-24, np.float32))


def test_multiplier_scales_rows(run_node) -> None:
    packed, table = make_table(4, None, "float16")
    options = attributes(4, None, "float16")
    (y,) = run_node("QEmbedding", [np.array([3], np.int64), packed], multiplier=24.0, **options)
    np.testing.assert_array_equal(y, table[[3]] * np.float32(24))


def test_scalar_and_empty_ids_have_their_shapes(run_node) -> None:
    packed, table = make_table(4, None, "float16")
    options = attributes(4, None, "float16")
    (y,) = run_node("QEmbedding", [np.array(7, np.int64), packed], **options)
    np.testing.assert_array_equal(y, table[7])
    (y,) = run_node("QEmbedding", [np.zeros((2, 0), np.int64), packed], **options)
    assert y.shape == (2, 0, K)


@pytest.mark.parametrize("bad", [-1, N, 2**40])
def test_ids_outside_the_vocabulary_are_named(run_node, bad) -> None:
    packed, _ = make_table(4, None, "float16")
    message = f"the_node.*id {bad} is outside of the vocabulary of {N}"
    with pytest.raises(Exception, match=message):
        run_node(
            "QEmbedding", [np.array([0, bad], np.int64), packed], **attributes(4, None, "float16")
        )


def test_wrong_bytes_are_refused(run_node) -> None:
    packed, _ = make_table(4, None, "float16")
    with pytest.raises(Exception, match="packed weight has shape"):
        run_node(
            "QEmbedding", [np.zeros(1, np.int64), packed[:-1]], **attributes(4, None, "float16")
        )
