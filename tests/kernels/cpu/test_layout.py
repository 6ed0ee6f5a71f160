"""The packed format, byte for byte, and its inverse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.kernels.cpu.layout import (
    CODINGS,
    OUTER_SCALES,
    PACKABLE_BITS,
    SCALE_DTYPES,
    Coding,
    ScaleDtype,
    WeightLayout,
    pack_linear,
    packed_size,
    unpack_linear,
)


def test_four_bits_are_where_the_format_says() -> None:
    rng = np.random.default_rng(0)
    n, k, group_size = 18, 40, 16
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scale = rng.uniform(0.5, 1, (n, 3)).astype(np.float16)
    zero = rng.integers(0, 16, (n, 3), dtype=np.uint8)
    packed = pack_linear(codes, scale, zero, bits=4, group_size=group_size)
    full = 32 + 16 + 16 * 16 // 2  # scales, zero points, codes of a full group
    short = 32 + 16 + 8 * 16 // 2
    assert packed.shape == (2 * (2 * full + short),)
    for row, column in [(0, 0), (3, 5), (15, 31), (16, 12), (17, 39)]:
        group, offset = divmod(column, group_size)
        at = (row // 16) * (2 * full + short) + group * full
        lane = row % 16
        assert packed[at : at + 32].view(np.float16)[lane] == scale[row, group]
        assert packed[at + 32 + lane] == zero[row, group]
        byte = packed[at + 48 + offset // 8 * 64 + 4 * lane + offset % 4]
        assert (byte >> 4 if offset % 8 >= 4 else byte & 15) == codes[row, column]


def test_eight_bits_are_where_the_format_says() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (16, 24), dtype=np.uint8)
    scale = rng.uniform(0.5, 1, (16, 1)).astype(np.float32)
    packed = pack_linear(codes, scale, bits=8, group_size=0, scale_dtype="float32")
    assert packed.shape == (64 + 24 * 16,)
    np.testing.assert_array_equal(packed[:64].view(np.float32), scale[:, 0])
    for row, column in [(0, 0), (7, 13), (15, 23)]:
        assert packed[64 + column // 4 * 64 + 4 * row + column % 4] == codes[row, column]


def code_at(unit: np.ndarray, bits: int, k: int, lane: int) -> int:
    """The code of k < 8 and a lane in a unit, read from the words of the format one bit plane
    after the other."""
    at = 64 * (k // 4) + 4 * lane + k % 4
    code = lowest = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            part, byte = divmod(at, 16 * width)
            code |= (int(unit[16 * lowest + byte]) >> part * width) % (1 << width) << lowest
            lowest += width
    return code


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_codes_are_where_the_format_says(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (16, 24), dtype=np.uint8)
    packed = pack_linear(codes, np.ones((16, 1), np.float16), bits=bits, group_size=0)
    units = packed[32:].reshape(3, 16 * bits)
    found = [[code_at(units[k // 8], bits, k % 8, lane) for k in range(24)] for lane in range(16)]
    np.testing.assert_array_equal(found, codes)


def test_six_bits_are_four_and_two() -> None:
    codes = np.zeros((16, 8), np.uint8)
    codes[3, 1] = 0b10_0000  # byte 13 of the picture: the first quarter
    codes[9, 6] = 0b01_1000  # byte 102: upper nibbles, the last quarter
    packed = pack_linear(codes, np.ones((16, 1), np.float16), bits=6, group_size=0)
    expected = np.zeros(64 + 32, np.uint8)
    expected[64 + 13] = 0b10
    expected[102 - 64] = 0b1000 << 4
    expected[64 + 102 - 96] = 0b01 << 6
    np.testing.assert_array_equal(packed[32:], expected)


@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_weights_take_their_bits_beside_the_scales(bits: int) -> None:
    size = packed_size(32, 128, WeightLayout(bits, 64, zero_dtype="uint8"))
    assert size * 8 == 32 * 128 * bits + 32 * 2 * (16 + 8)


def test_padding_is_zero_weight() -> None:
    # K = 20 pads to 24 with the zero point, N = 3 to 16 with scale 0.
    codes = np.full((3, 20), 9, np.uint8)
    zero = np.full((3, 1), 5, np.uint8)
    packed = pack_linear(codes, np.ones((3, 1), np.float32), zero, bits=8, group_size=0)
    scales = packed[:32].view(np.float16)
    np.testing.assert_array_equal(scales, [1] * 3 + [0] * 13)
    np.testing.assert_array_equal(packed[48 + 5 * 64 : 48 + 5 * 64 + 12], 5)


@st.composite
def weights(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and options of `pack_linear`."""
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 150))
    coding: Coding = draw(st.sampled_from(tuple(CODINGS)))
    bits = draw(st.sampled_from(CODINGS[coding]))
    group_size = draw(st.sampled_from([0, 16, 32, 48, 64, 128]))
    scale_dtype: ScaleDtype = draw(st.sampled_from(SCALE_DTYPES))
    zeros = draw(st.sampled_from(["uint8", "float16"])) if coding == "integer" else None
    zeros = draw(st.sampled_from([zeros, None]))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    grouped = (n, 1 if group_size == 0 else -(-k // group_size))
    scale = rng.integers(1, 128, grouped, dtype=np.uint8)
    shared = {"weight": 1, "row": n}.get(OUTER_SCALES.get(scale_dtype, ""))
    tensors = {
        "codes": rng.integers(0, 3 if coding == "ternary" else 1 << bits, (n, k), dtype=np.uint8),
        # Exact in every type.
        "scale": scale if scale_dtype in SCALE_DTYPES[3:] else scale.astype(np.float32) / 64,
        "zero_point": {
            None: None,
            "uint8": rng.integers(0, 1 << bits, grouped, dtype=np.uint8),
            "float16": rng.normal(0, 1 << bits, grouped).astype(np.float16),
        }[zeros],
        "levels": rng.random(1 << bits, np.float32) if coding == "table" else None,
        "outer_scale": None if shared is None else rng.random(shared, np.float32),
    }
    options = {"bits": bits, "group_size": group_size, "scale_dtype": scale_dtype, "coding": coding}
    return tensors, options


@given(weights())
def test_unpack_is_the_inverse_of_pack(weight: tuple[dict[str, Any], dict[str, Any]]) -> None:
    tensors, options = weight
    shape = tensors["codes"].shape
    zero_point = tensors["zero_point"]
    zero_dtype = None if zero_point is None else str(zero_point.dtype)
    layout = WeightLayout(**options, zero_dtype=zero_dtype)
    packed = pack_linear(**tensors, **options)
    assert packed.size == packed_size(*shape, layout)
    assert WeightLayout.parse(str(layout)) == layout
    back = unpack_linear(packed, *shape, layout)
    for name, tensor in tensors.items():
        found = getattr(back, name)
        if tensor is None:
            assert found is None
        else:
            np.testing.assert_array_equal(found, tensor)


def test_ternary_codes_are_where_the_format_says() -> None:
    # 28 k are 7 quads: five share bytes, two stand in planes of 2 bits.
    codes = np.random.default_rng(0).integers(0, 3, (16, 28), dtype=np.uint8)
    packed = pack_linear(
        codes, np.ones((16, 1), np.float16), bits=2, group_size=0, coding="ternary"
    )
    # K is padded to 32: one quad more.
    assert packed.shape == (32 + 64 + 3 * 16,)
    for lane, k in [(0, 0), (3, 1), (15, 3)]:
        number = 0
        for digit in range(5):
            number = 3 * number + int(codes[lane, 4 * digit + k])
        assert packed[32 + 4 * lane + k] == -(-256 * number // 243)
    for lane, k in [(0, 20), (7, 25), (15, 27)]:
        quad, at = (k - 20) // 4, 4 * lane + k % 4
        assert packed[96 + 16 * quad + at % 16] >> 2 * (at // 16) & 3 == codes[lane, k]


def test_levels_and_outer_scales_come_first() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 6, (18, 16), dtype=np.uint8)
    levels, outer = rng.random(6, np.float32), rng.random(18, np.float32)
    packed = pack_linear(
        codes,
        np.full((18, 1), 7, np.uint8),
        bits=3,
        group_size=0,
        scale_dtype="uint8",
        coding="table",
        levels=levels,
        outer_scale=outer,
    )
    floats = packed[: 4 * (16 + 32)].view(np.float32)
    np.testing.assert_array_equal(floats[:6], levels)
    np.testing.assert_array_equal(floats[6:16], levels[-1])
    np.testing.assert_array_equal(floats[16:], [*outer, *[0] * 14])
    assert packed.size == 4 * (16 + 32) + 2 * (16 + 2 * 48)


def _codes(value: int = 0) -> np.ndarray:
    return np.full((4, 32), value, np.uint8)


def _scale(value: float = 1.0, groups: int = 1) -> np.ndarray:
    return np.full((4, groups), value, np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((_codes(16), _scale()), {}, "codes hold 16, which 4 bits do not"),
        ((_codes(), _scale(), np.full((4, 1), 16, np.uint8)), {}, "zero_point hold 16"),
        ((_codes(), _scale(0.1)), {}, "is no float16: round scales before"),
        ((_codes(), _scale(1e6)), {}, "is no float16"),
        ((_codes(), _scale(0.1)), {"scale_dtype": "bfloat16"}, "is no bfloat16"),
        ((_codes(), _scale(groups=2)), {}, "scale has shape"),
        ((_codes(), _scale(), np.zeros((4, 2), np.uint8)), {}, "zero_point must be"),
        ((_codes().astype(np.int32), _scale()), {}, "codes must be"),
        ((_codes(), _scale()), {"bits": 0}, "bits = 0"),
        ((_codes(), _scale()), {"bits": 9}, "bits = 9"),
        ((_codes(8), _scale()), {"bits": 3}, "codes hold 8, which 3 bits do not"),
        ((_codes(), _scale()), {"group_size": 8}, "group_size = 8"),
        ((_codes(), _scale()), {"scale_dtype": "float64"}, "scale_dtype = 'float64'"),
        ((_codes()[:0], _scale()[:0]), {}, "cannot be packed"),
        ((_codes(3), _scale()), {"coding": "ternary", "bits": 2}, "ternary digits do not"),
        ((_codes(), _scale()), {"coding": "e4m3"}, "bits = 4"),
        ((_codes(), _scale()), {"coding": "posit"}, "coding = 'posit'"),
        ((_codes(), _scale()), {"coding": "table"}, "levels are given"),
        ((_codes(), _scale()), {"coding": "table", "levels": np.zeros(17)}, "cannot tell levels"),
        ((_codes(), _scale()), {"scale_dtype": "e8m0"}, "are uint8 codes"),
        ((_codes(), _codes()[:, :1]), {"scale_dtype": "e4m3"}, "outer_scale has shape None"),
        ((_codes(), _scale(), _codes()[:, :1]), {"coding": "e2m1"}, "have no zero points"),
    ],
)
def test_bad_weights_are_refused(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        pack_linear(*arguments, **{"bits": 4, "group_size": 0, **options})


def test_unpack_refuses_the_wrong_size() -> None:
    with pytest.raises(ValueError, match="packed must be"):
        unpack_linear(np.zeros(10, np.uint8), 4, 32, WeightLayout(4, 0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "describes no packed weight"),
        ("integer-4-g32", "describes no packed weight"),
        ("integer-4-g32-float64", "describes no packed weight"),
        ("whole-4-g32-float16", "describes no packed weight"),
        ("integer-4-g32-float16-zero", "describes no packed weight"),
        ("integer-9-g32-float16", "bits = 9"),
        ("integer-4-g20-float16", "group_size = 20"),
        ("e2m1-4-g32-float16-zeros", "no zero points"),
    ],
)
def test_text_of_no_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightLayout.parse(text)
