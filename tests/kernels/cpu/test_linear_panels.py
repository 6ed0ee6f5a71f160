"""Many rows go another way through QLinear, by panels, and must give what they give apart."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.cpu.conftest import NodeRunner

from qcompile.kernels.cpu.layout import Coding, pack_linear

LEAST_PANEL_ROWS = 64
PANEL_ROWS = 12
K, N = 88, 40  # groups of 32 leave a short one; 40 columns leave half a block, and one block over


def make_weight(
    bits: int, group: int, zeros: bool, coding: Coding = "integer"
) -> tuple[np.ndarray, dict[str, int | str]]:
    rng = np.random.default_rng(bits)
    groups = -(-K // group) if group else 1
    levels = 3 if coding == "ternary" else 1 << bits
    codes = rng.integers(0, levels, (N, K), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.02, (N, groups)).astype(np.float16).astype(np.float32)
    zero = rng.integers(0, levels, (N, groups), dtype=np.uint8) if zeros else None
    packed = pack_linear(codes, scale, zero, bits=bits, group_size=group, coding=coding)
    attributes: dict[str, int | str] = {"N": N, "K": K, "bits": bits, "group_size": group}
    return packed, attributes | {
        "has_zero_point": int(zeros),
        "scale_dtype": 1,
        "coding": coding,
    }


def inputs(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float32)


@pytest.mark.parametrize("act", ["int8_token", "int8_group"])
@pytest.mark.parametrize(
    ("bits", "group", "zeros", "coding"),
    [
        (4, 32, True, "integer"),
        (4, 0, False, "integer"),
        (3, 16, False, "integer"),
        (8, 32, False, "integer"),
        (8, 32, True, "integer"),  # does not fit signed bytes: goes row by row after all
        (2, 32, False, "ternary"),
        (4, 16, False, "e2m1"),
    ],
)
def test_rows_together_are_what_they_are_apart(
    isa: str, run_node: NodeRunner, act: str, bits: int, group: int, zeros: bool, coding: Coding
) -> None:
    del isa
    packed, attributes = make_weight(bits, group, zeros, coding)
    x = inputs(LEAST_PANEL_ROWS + 1)
    (together,) = run_node("QLinear", [x, packed], act=act, **attributes)
    apart = [
        run_node("QLinear", [part, packed], act=act, **attributes)[0] for part in np.split(x, 5)
    ]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize("rows", [LEAST_PANEL_ROWS, *range(6 * PANEL_ROWS, 7 * PANEL_ROWS)])
def test_every_length_of_the_last_panel(isa: str, run_node: NodeRunner, rows: int) -> None:
    del isa
    packed, attributes = make_weight(4, 32, True)
    x = inputs(rows)
    residual = np.random.default_rng(0).standard_normal((rows, N)).astype(np.float32)
    bias = np.arange(N, dtype=np.float32)
    options = {"act": "int8_token", **attributes}
    (together,) = run_node("QLinear", [x, packed, bias, residual], **options)
    (first,) = run_node("QLinear", [x[:16], packed, bias, residual[:16]], **options)
    (last,) = run_node("QLinear", [x[-16:], packed, bias, residual[-16:]], **options)
    np.testing.assert_array_equal(together[:16], first)
    np.testing.assert_array_equal(together[-16:], last)


def test_panels_do_not_depend_on_threads(isa: str, run_node: NodeRunner) -> None:
    del isa
    packed, attributes = make_weight(4, 32, True)
    x = np.tile(inputs(64), (40, 1))  # enough work to be shared
    results = [
        run_node("QLinear", [x, packed], threads=threads, act="int8_group", **attributes)[0]
        for threads in (1, 2, 3)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
