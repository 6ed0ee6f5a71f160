"""QLinear against a numpy oracle that knows nothing of the packed layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from tests.kernels.cpu.conftest import product_tolerance

from qcompile.kernels.cpu.layout import PACKABLE_BITS, SCALE_DTYPES, ScaleDtype, pack_linear

FLOAT_SCALES = SCALE_DTYPES[:3]  # the others belong to lookup formats: test_lookup_codes.py

TOLERANCE = product_tolerance("scalar", "float", 1)


def round_to(values: np.ndarray, dtype: ScaleDtype) -> np.ndarray:
    """Rounds positive float32 to the scale type."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits >> 16) << 16).view(np.float32)
    return values.astype(dtype).astype(np.float32)


@dataclass(frozen=True)
class Weight:
    codes: np.ndarray  # [N, K]
    scale: np.ndarray  # [N, G]
    zero_point: np.ndarray | None  # [N, G]
    bits: int
    group_size: int
    scale_dtype: ScaleDtype

    @classmethod
    def random(
        cls,
        n: int,
        k: int,
        *,
        bits: int = 4,
        group_size: int = 32,
        zeros: bool | Literal["float"] = False,
        scale_dtype: ScaleDtype = "float16",
        seed: int = 0,
    ) -> Weight:
        rng = np.random.default_rng(seed)
        groups = 1 if group_size == 0 else -(-k // group_size)
        codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
        scale = round_to(rng.uniform(0.005, 0.02, (n, groups)).astype(np.float32), scale_dtype)
        zero = rng.integers(0, 1 << bits, (n, groups), dtype=np.uint8) if zeros else None
        if zeros == "float":
            zero = rng.normal(1 << (bits - 1), 1 << bits, (n, groups)).astype(np.float16)
        return cls(codes, scale, zero, bits, group_size, scale_dtype)

    @property
    def span(self) -> int:
        """Weights per group."""
        return self.group_size or self.codes.shape[1]

    def along_k(self, per_group: np.ndarray) -> np.ndarray:
        return np.repeat(per_group, self.span, axis=1)[:, : self.codes.shape[1]]

    def centred(self) -> np.ndarray:
        """Codes minus zero points, float64 [N, K]."""
        middle = np.full(self.scale.shape, 1 << (self.bits - 1))
        zero = self.zero_point if self.zero_point is not None else middle
        return self.codes - self.along_k(zero.astype(np.float64))

    def floats(self) -> np.ndarray:
        """The weight in float64."""
        return self.centred() * self.along_k(self.scale.astype(np.float64))

    def packed(self) -> np.ndarray:
        return pack_linear(
            self.codes,
            self.scale,
            self.zero_point,
            bits=self.bits,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
        )

    def attributes(self) -> dict[str, int]:
        n, k = self.codes.shape
        return {
            "N": n,
            "K": k,
            "bits": self.bits,
            "group_size": self.group_size,
            "has_zero_point": int(self.zero_point is not None),
            "float_zero_point": int(
                self.zero_point is not None and self.zero_point.dtype != np.uint8
            ),
            "scale_dtype": SCALE_DTYPES.index(self.scale_dtype),
        }


def quantize(x: np.ndarray, span: int, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes over `span` columns: int32 [M, K], with scales float32 [M, K / span]."""
    largest = 2 ** (bits - 1) - 1
    codes = np.empty(x.shape, np.int32)
    scales = []
    for begin in range(0, x.shape[1], span):
        part = x[:, begin : begin + span]
        scale = (np.abs(part).max(axis=1, keepdims=True) / np.float32(largest)).astype(np.float32)
        scale[scale == 0] = 1
        codes[:, begin : begin + span] = np.clip(np.rint(part / scale), -largest, largest)
        scales.append(scale)
    return codes, np.concatenate(scales, axis=1)


def integer_oracle(x: np.ndarray, weight: Weight, act: str) -> np.ndarray:
    """Exact integer sums per group, then float32 in the order of the groups."""
    k = x.shape[1]
    integer, granularity = act.split("_")
    per_token = granularity == "token"
    codes, scales = quantize(x, k if per_token else weight.span, int(integer.removeprefix("int")))
    centred = weight.centred()
    y = np.zeros((x.shape[0], weight.codes.shape[0]), np.float32)
    for g, begin in enumerate(range(0, k, weight.span)):
        part = slice(begin, begin + weight.span)
        exact = codes[:, part].astype(np.float64) @ centred[:, part].T
        act_scale = scales[:, :1] if per_token else scales[:, g : g + 1]
        y += exact.astype(np.float32) * (weight.scale[:, g] * act_scale)
    return y


def oracle(x: np.ndarray, weight: Weight, act: str) -> np.ndarray:
    if act == "float":
        return x.astype(np.float64) @ weight.floats().T
    return integer_oracle(x, weight, act)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def activations(rows: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("bits", PACKABLE_BITS)
@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 128])
def test_groups_match_oracle(run_node, isa, act, bits, group_size) -> None:
    # K = 200 leaves a short last group for 16, 32, 64 and 128; N is no multiple of 16.
    weight = Weight.random(77, 200, bits=bits, group_size=group_size)
    for rows in (1, 5):
        x = activations(rows, 200)
        inputs = [x, weight.packed()]
        (y,) = run_node("QLinear", inputs, act=act, **weight.attributes())
        assert relative_error(y, oracle(x, weight, act)) < TOLERANCE


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("zeros", [False, True, "float"])
@pytest.mark.parametrize("scale_dtype", FLOAT_SCALES)
@pytest.mark.parametrize("bits", [4, 8])
def test_scale_types_and_zero_points_match_oracle(
    run_node, isa, act, zeros, scale_dtype, bits
) -> None:
    weight = Weight.random(33, 96, bits=bits, zeros=zeros, scale_dtype=scale_dtype)
    x = activations(3, 96)
    (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
    assert relative_error(y, oracle(x, weight, act)) < TOLERANCE


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_wide_and_partial_blocks_match_oracle(run_node, isa, act, bits) -> None:
    # 130 columns: wide, narrow and partial column blocks. K = 131 is no multiple of 8.
    weight = Weight.random(130, 131, bits=bits, group_size=64, zeros=True)
    for rows in (1, 2, 9):
        x = activations(rows, 131)
        (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
        assert relative_error(y, oracle(x, weight, act)) < TOLERANCE


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("k", [131, 136])
def test_one_padded_group_per_row_matches_oracle(run_node, isa, act, k) -> None:
    weight = Weight.random(40, k, bits=4, group_size=0, zeros=True)
    # A longer row first: what it leaves in the scratch memory must not be read.
    longer = Weight.random(16, 256)
    inputs = [np.full((4, 256), 9.0, np.float32), longer.packed()]
    run_node("QLinear", inputs, act=act, **longer.attributes())
    x = activations(3, k)
    (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
    assert relative_error(y, oracle(x, weight, act)) < TOLERANCE


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_number_of_rows_matches_oracle(run_node, isa, act, bits) -> None:
    weight = Weight.random(130, 131, bits=bits, group_size=64, zeros=True)
    x = activations(33, 131)
    expected = oracle(x, weight, act)
    for rows in range(1, 34):
        (y,) = run_node("QLinear", [x[:rows], weight.packed()], act=act, **weight.attributes())
        assert relative_error(y, expected[:rows]) < product_tolerance(isa, act, rows)


@pytest.mark.parametrize("act", ["float", "int8_token"])
def test_many_rows_and_long_groups_match_oracle(run_node, isa, act) -> None:
    weight = Weight.random(40, 1000, bits=8, group_size=0)
    x = activations(150, 1000)
    (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
    assert relative_error(y, oracle(x, weight, act)) < product_tolerance(isa, act, len(x))


@pytest.mark.parametrize("act", ["float", "int8_token"])
@pytest.mark.parametrize("bits", PACKABLE_BITS)
def test_extreme_codes_do_not_saturate(run_node, isa, act, bits) -> None:
    # The largest codes and all activations alike: the largest sums that instructions meet.
    largest = (1 << bits) - 1
    codes = np.full((16, 4096), largest, np.uint8)
    zero = np.zeros((16, 1), np.uint8)
    weight = Weight(codes, np.ones((16, 1), np.float32), zero, bits, 0, "float32")
    x = np.full((1, 4096), 2.0, np.float32)
    (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
    np.testing.assert_allclose(y, largest * 2.0 * 4096, rtol=TOLERANCE)


def test_leading_axes_bias_and_residual_are_kept(run_node, isa) -> None:
    weight = Weight.random(20, 48)
    x = activations(6, 48)
    bias = activations(1, 20, seed=2)[0]
    residual = activations(6, 20, seed=3)
    inputs = [x.reshape(2, 3, 48), weight.packed(), bias, residual.reshape(2, 3, 20)]
    (y,) = run_node("QLinear", inputs, **weight.attributes())
    assert y.shape == (2, 3, 20)
    expected = x @ weight.floats().T + bias + residual
    assert relative_error(y.reshape(6, 20), expected) < TOLERANCE


def test_residual_needs_no_bias(run_node, isa) -> None:
    weight = Weight.random(20, 48)
    x = activations(2, 48)
    residual = activations(2, 20, seed=3)
    (y,) = run_node("QLinear", [x, weight.packed(), None, residual], **weight.attributes())
    assert relative_error(y, x @ weight.floats().T + residual) < TOLERANCE


@pytest.mark.parametrize("act", ["int8_token", "int8_group"])
def test_zero_and_tiny_activations_give_zero(run_node, isa, act) -> None:
    weight = Weight.random(17, 64)
    x = np.zeros((2, 64), np.float32)
    x[1] = 1e-45  # max / 127 underflows to 0
    (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
    np.testing.assert_array_equal(y, np.zeros((2, 17), np.float32))


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_reach_only_their_row(run_node, isa, act, poison) -> None:
    weight = Weight.random(40, 100)
    for rows in (3, 9):
        x = activations(rows, 100)
        x[1, 37] = poison
        (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
        # A zero weight times infinity is NaN, so every output of the row is NaN or infinite,
        # except that float activations leave |inf * w| = inf.
        assert not np.isfinite(y[1]).any()
        assert np.isfinite(np.delete(y, 1, axis=0)).all()


@pytest.mark.parametrize("act", ["int2_token", "int4_token", "int4_group", "int7_group"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_activations_of_few_bits_match_oracle(run_node, isa, act, rows) -> None:
    weight = Weight.random(40, 131, group_size=32, zeros=True)
    x = activations(rows, 131)
    x[0, :32] = 1e-45 * np.arange(-16, 16)  # scales this small are coarse: codes meet their bounds
    (y,) = run_node("QLinear", [x, weight.packed()], act=act, **weight.attributes())
    assert relative_error(y, oracle(x, weight, act)) < TOLERANCE


def test_no_rows_give_an_empty_output(run_node, isa) -> None:
    weight = Weight.random(20, 48)
    x = np.zeros((0, 48), np.float32)
    (y,) = run_node("QLinear", [x, weight.packed()], **weight.attributes())
    assert y.shape == (0, 20)


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("rows", [1, 4, 70])
def test_thread_count_changes_no_bit(run_node, isa, act, rows) -> None:
    weight = Weight.random(700, 512, group_size=64, zeros=True)
    x = activations(rows, 512)
    inputs, options = [x, weight.packed()], {"act": act, **weight.attributes()}
    (one,) = run_node("QLinear", inputs, threads=1, **options)
    (two,) = run_node("QLinear", inputs, threads=2, **options)
    np.testing.assert_array_equal(one, two)


GOOD = {"N": 20, "K": 48, "bits": 4, "group_size": 16, "has_zero_point": 0, "scale_dtype": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0}, "bits = 0 is not supported"),
        ({"bits": 9}, "bits = 9 is not supported"),
        ({"group_size": 24}, "group_size = 24"),
        ({"group_size": -16}, "group_size = -16"),
        ({"scale_dtype": 6}, "scale_dtype = 6"),
        ({"has_zero_point": 2}, "has_zero_point = 2"),
        ({"float_zero_point": 1}, "float_zero_point = 1 is neither 0 nor, of zero points, 1"),
        ({"act": "int3"}, "act = 'int3'"),
        ({"N": 0}, "N = 0"),
        ({"N": 2**62, "K": 2**62}, "are no size"),
        ({"K": 100000, "group_size": 0, "act": "int8_token"}, "groups of at most 65536"),
        ({"N": None}, "attribute 'N' is missing"),
    ],
)
def test_bad_attributes_are_named(make_session, changes, message) -> None:
    attributes = {name: v for name, v in {**GOOD, **changes}.items() if v is not None}
    inputs = [np.zeros((1, 48), np.float32), np.zeros(1, np.uint8)]
    with pytest.raises(Exception, match=message) as error:
        make_session("QLinear", inputs, **attributes)
    assert "com.qcompile.QLinear node 'the_node'" in str(error.value)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, np.zeros((2, 47), np.float32), r"x has shape \[2, 47\], but K = 48"),
        (0, np.zeros((), np.float32), r"x has shape \[\]"),
        (1, np.zeros(7, np.uint8), r"packed weight has shape \[7\] instead of"),
        (2, np.zeros(19, np.float32), r"bias has shape \[19\]"),
        (3, np.zeros((1, 20), np.float32), r"residual has shape \[1, 20\]"),
    ],
)
def test_bad_shapes_are_named(run_node, index, value, message) -> None:
    weight = Weight.random(20, 48)
    inputs: list[np.ndarray | None] = [activations(2, 48), weight.packed(), None, None]
    inputs[index] = value
    with pytest.raises(Exception, match=message) as error:
        run_node("QLinear", inputs, **weight.attributes())
    assert "the_node" in str(error.value)
