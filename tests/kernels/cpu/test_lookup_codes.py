"""QLinear and QEmbedding over codes that are no plain integers, against the formats' decoding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.kernels.cpu.conftest import product_tolerance

from qcompile.backends.cpu.packable import layout_of
from qcompile.formats import QuantizedWeight, parse_format
from qcompile.kernels.cpu.layout import pack_linear
from qcompile.kernels.quantize.reference import dynamic_scale, quantize

TOLERANCE = product_tolerance("scalar", "float", 1)

FORMATS = (
    "ternary",
    "ternary-g16",
    "ternary-g64",
    "nf4-g64",
    "nf4-g32-dq",
    "nf4-bf16",
    "fp4-g32",
    "e3m0-g32-e8m0",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "fp8",
    "fp8-g128-fp16",
    "e5m2",
    "mxfp6",
    "(-2,-0.5,0.25,1)-g16-fp32",
    "(-1,-0.25,0,0.5,1)",
    "(-1,1)-g32",
)
WITH_BYTES = [name for name in FORMATS if name.startswith(("ternary", "fp4", "mxfp4", "nvfp4"))]


@dataclass(frozen=True)
class Weight:
    quantized: QuantizedWeight

    @staticmethod
    def random(name: str, n: int, k: int) -> Weight:
        values = torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 0.05
        # Rows of different sizes: their scales must differ.
        values *= torch.linspace(0.5, 2, n).unsqueeze(1)
        return Weight(parse_format(name).encode(values, scale_search="mse"))

    @property
    def floats(self) -> np.ndarray:
        return self.quantized.format.decode(self.quantized).numpy()

    @property
    def packed(self) -> np.ndarray:
        format, tensors = self.quantized.format, self.quantized.tensors
        layout = layout_of(format)
        outer, scale = tensors.get("outer_scale"), tensors["scale"]
        levels = np.array(format.levels, np.float32) if layout.coding == "table" else None
        return pack_linear(
            tensors["codes"].numpy(),
            (scale.float() if scale.is_floating_point() else scale).numpy(),
            bits=layout.bits,
            group_size=layout.group_size,
            scale_dtype=layout.scale_dtype,
            coding=layout.coding,
            levels=levels,
            outer_scale=None if outer is None else outer.reshape(-1).numpy(),
        )

    @property
    def attributes(self) -> dict[str, int | str]:
        layout = layout_of(self.quantized.format)
        n, k = self.quantized.shape
        return {"N": n, "K": k, **layout.attributes()}


def activations(rows: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, k)).astype(np.float32)


def rounded(x: np.ndarray, group_size: int) -> np.ndarray:
    """As int8 with a scale per token, or per token and group, in float64."""
    tensor = torch.from_numpy(x)
    scale = dynamic_scale(tensor, 8, group_size)
    codes = quantize(tensor, scale, None, 8, group_size).double()
    spread = scale.double().repeat_interleave(group_size or x.shape[1], dim=1)[:, : x.shape[1]]
    return (codes * spread).numpy()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("n", "k"), [(77, 200), (130, 131)])
def test_float_activations_match_decoded_weight(run_node, isa, name, n, k) -> None:
    # Neither N nor K is a multiple of the blocks; short last groups; one and several rows, and
    # enough of them that weights are decoded to panels.
    weight = Weight.random(name, n, k)
    for rows in (1, 3, 9):
        x = activations(rows, k)
        (y,) = run_node("QLinear", [x, weight.packed], **weight.attributes)
        assert relative_error(y, x.astype(np.float64) @ weight.floats.T) < TOLERANCE


@pytest.mark.parametrize("act", ["int8_token", "int8_group"])
@pytest.mark.parametrize("name", WITH_BYTES)
@pytest.mark.parametrize(("n", "k"), [(77, 200), (130, 131)])
def test_int8_activations_match_decoded_weight(run_node, isa, name, n, k, act) -> None:
    weight = Weight.random(name, n, k)
    for rows in (1, 2, 9):
        x = activations(rows, k)
        (y,) = run_node("QLinear", [x, weight.packed], act=act, **weight.attributes)
        group_size = weight.quantized.format.group_size if act == "int8_group" else 0
        assert relative_error(y, rounded(x, group_size) @ weight.floats.T) < TOLERANCE


@pytest.mark.parametrize("name", ["ternary", "fp4-g64", "nf4-g64", "fp8"])
def test_many_rows_and_long_groups_match_decoded_weight(run_node, isa, name) -> None:
    weight = Weight.random(name, 40, 1000)
    x = activations(150, 1000)
    (y,) = run_node("QLinear", [x, weight.packed], **weight.attributes)
    assert relative_error(y, x.astype(np.float64) @ weight.floats.T) < product_tolerance(
        isa, "float", len(x)
    )


@pytest.mark.parametrize("code", range(256))
def test_every_small_float_is_decoded_exactly(run_node, isa, code) -> None:
    if code % 128 == 127:
        pytest.skip("not a number")
    format = parse_format("fp8")
    codes = torch.full((1, 16), code, dtype=torch.uint8)
    weight = Weight(QuantizedWeight(format, (1, 16), {"codes": codes, "scale": torch.ones(1, 1)}))
    x = np.eye(16, dtype=np.float32)[:1]
    (y,) = run_node("QLinear", [x, weight.packed], **weight.attributes)
    assert y.item() == format.levels[code]


def test_every_byte_of_ternary_digits_is_decoded_exactly(run_node, isa) -> None:
    # Column n, quads 0 to 4: the five digits of n % 243, and noise in the other k of a quad.
    n = 256
    codes = torch.randint(0, 3, (n, 20), generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(n) % 243
    for digit in range(5):
        codes[:, 4 * digit] = numbers // 3 ** (4 - digit) % 3
    tensors = {"codes": codes.to(torch.uint8), "scale": torch.ones(n, 1, dtype=torch.float16)}
    weight = Weight(QuantizedWeight(parse_format("ternary"), (n, 20), tensors))
    # K = 20 is padded to 24: five quads of digits by fives and one by itself.
    for act in ("float", "int8_token"):
        x = np.eye(20, dtype=np.float32) * 127
        (y,) = run_node("QLinear", [x, weight.packed], act=act, **weight.attributes)
        np.testing.assert_array_equal(y.T, (codes.numpy() - 1) * 127.0)


@pytest.mark.parametrize("k", [32_640, 32_680, 40_004])
def test_long_rows_of_ternary_digits_sum_exactly(run_node, isa, k) -> None:
    # Undivided bytes are multiplied while a group's sum fits 24 bits; these are on both sides.
    tensors = {"codes": torch.full((16, k), 2, dtype=torch.uint8)}
    tensors["scale"] = torch.ones(16, 1, dtype=torch.float16)
    weight = Weight(QuantizedWeight(parse_format("ternary"), (16, k), tensors))
    for sign in (1, -1):
        x = np.full((1, k), sign * 127, np.float32)
        (y,) = run_node("QLinear", [x, weight.packed], act="int8_token", **weight.attributes)
        np.testing.assert_array_equal(y, sign * 127.0 * k)


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_rows_are_exact(run_node, name) -> None:
    weight = Weight.random(name, 37, 75)
    ids = np.array([[0, 36, 5], [16, 15, 5]], np.int64)
    (y,) = run_node("QEmbedding", [ids, weight.packed], **weight.attributes)
    np.testing.assert_array_equal(y, weight.floats[ids])


@pytest.mark.parametrize("name", ["ternary-g64", "mxfp4", "nf4-g64-dq", "fp8"])
@pytest.mark.parametrize("rows", [1, 4, 70])
def test_thread_count_changes_no_bit(run_node, isa, name, rows) -> None:
    weight = Weight.random(name, 700, 512)
    inputs = [activations(rows, 512), weight.packed]
    (one,) = run_node("QLinear", inputs, threads=1, **weight.attributes)
    (two,) = run_node("QLinear", inputs, threads=2, **weight.attributes)
    np.testing.assert_array_equal(one, two)


GOOD = {"N": 20, "K": 48, "bits": 4, "group_size": 16, "scale_dtype": 1, "coding": "table"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coding": "posit"}, "coding = 'posit' is none of"),
        ({"coding": "e4m3"}, "bits = 4, but the coding has 8"),
        ({"coding": "ternary"}, "bits = 4, but the coding has 2"),
        ({"has_zero_point": 1}, "only integers have zero points"),
        ({"scale_dtype": 6}, "scale_dtype = 6"),
        ({"act": "int8_token"}, "int8 activations need a weight of whole numbers"),
    ],
)
def test_bad_attributes_are_named(make_session, changes, message) -> None:
    inputs = [np.zeros((1, 48), np.float32), np.zeros(1, np.uint8)]
    with pytest.raises(Exception, match=message) as error:
        make_session("QLinear", inputs, **{**GOOD, **changes})
    assert "com.qcompile.QLinear node 'the_node'" in str(error.value)


def test_weight_without_its_levels_is_refused(run_node) -> None:
    weight = Weight.random("nf4-g16", 20, 48)
    with pytest.raises(Exception, match="packed weight has shape"):
        run_node("QLinear", [activations(1, 48), weight.packed[64:]], **weight.attributes)
