"""Many rows go another way through QLinear, by panels, and must give what they give apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest
from tests.kernels.cpu.conftest import NodeRunner

from qcompile.kernels.cpu.layout import Coding, pack_linear

# Fewer than the first take no panels anywhere, as many as the second everywhere.
LEAST_PANEL_ROWS, MOST_LEAST_PANEL_ROWS = 16, 64
K, N = 88, 40  # groups of 32 leave a short one; 40 columns leave half a block, and one block over


def make_weight(
    bits: int, group: int, zeros: bool | Literal["float"], coding: Coding = "integer"
) -> tuple[np.ndarray, dict[str, int | str]]:
    rng = np.random.default_rng(bits)
    groups = -(-K // group) if group else 1
    levels = 3 if coding == "ternary" else 1 << bits
    codes = rng.integers(0, levels, (N, K), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.02, (N, groups)).astype(np.float16).astype(np.float32)
    zero = rng.integers(0, levels, (N, groups), dtype=np.uint8) if zeros else None
    if zeros == "float":
        zero = rng.normal(levels / 2, levels, (N, groups)).astype(np.float16)
    packed = pack_linear(codes, scale, zero, bits=bits, group_size=group, coding=coding)
    attributes: dict[str, int | str] = {"N": N, "K": K, "bits": bits, "group_size": group}
    return packed, attributes | {
        "has_zero_point": int(bool(zeros)),
        "float_zero_point": int(zeros == "float"),
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
        (8, 32, True, "integer"),  # does not fit signed bytes
        (7, 0, True, "integer"),
        (1, 32, True, "integer"),
        (4, 32, "float", "integer"),
        (8, 0, "float", "integer"),
        (3, 16, "float", "integer"),
        (2, 32, False, "ternary"),
        (4, 16, False, "e2m1"),
    ],
)
def test_rows_together_are_what_they_are_apart(
    isa: str,
    run_node: NodeRunner,
    act: str,
    bits: int,
    group: int,
    zeros: bool | Literal["float"],
    coding: Coding,
) -> None:
    del isa
    packed, attributes = make_weight(bits, group, zeros, coding)
    x = inputs(MOST_LEAST_PANEL_ROWS + 1)
    (together,) = run_node("QLinear", [x, packed], act=act, **attributes)
    apart = [
        run_node("QLinear", [part, packed], act=act, **attributes)[0] for part in np.split(x, 5)
    ]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_length_of_the_last_panel(
    isa: str, make_session: Callable[..., ort.InferenceSession], bits: int
) -> None:
    del isa
    packed, attributes = make_weight(bits, 32, True)
    most = MOST_LEAST_PANEL_ROWS + 24
    x = inputs(most)
    residual = np.random.default_rng(0).standard_normal((most, N)).astype(np.float32)
    bias = np.arange(N, dtype=np.float32)
    values = [x, packed, bias, residual]
    session = make_session("QLinear", values, act="int8_token", **attributes)

    def run(begin: int, end: int) -> np.ndarray:
        rows = {"x0": x[begin:end], "x1": packed, "x2": bias, "x3": residual[begin:end]}
        (y,) = session.run(None, rows)
        return np.asarray(y)

    few = LEAST_PANEL_ROWS // 2
    alone = np.concatenate([run(at, at + few) for at in range(0, most, few)])
    for rows in range(LEAST_PANEL_ROWS, most):
        np.testing.assert_array_equal(run(0, rows), alone[:rows])


@pytest.mark.parametrize(("bits", "sign"), [(4, 1), (4, -1), (7, 1), (7, -1), (8, 1), (8, -1)])
def test_the_largest_codes_do_not_saturate(
    isa: str, run_node: NodeRunner, bits: int, sign: int
) -> None:
    del isa
    largest = (1 << bits) - 1
    packed = pack_linear(
        np.full((16, 256), largest, np.uint8),
        np.ones((16, 1), np.float32),
        np.zeros((16, 1), np.uint8),
        bits=bits,
        group_size=0,
        scale_dtype="float32",
    )
    grid = np.array([1.0, 128.0], np.float32)  # codes of -128 and 127
    x = np.full((MOST_LEAST_PANEL_ROWS, 256), sign * 1000.0, np.float32)
    (y,) = run_node(
        "QLinear",
        [x, packed, None, None, grid],
        act="uint8_static",
        N=16,
        K=256,
        bits=bits,
        group_size=0,
        has_zero_point=1,
        scale_dtype=0,
    )
    np.testing.assert_array_equal(y, 256.0 * largest * (127 if sign > 0 else -128))


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
