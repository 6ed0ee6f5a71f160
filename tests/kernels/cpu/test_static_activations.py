"""Products with activations whose codes were fixed before, against exact sums of integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.kernels.cpu.conftest import NodeRunner
from tests.kernels.cpu.test_qlinear import TOLERANCE, Weight, activations, relative_error

SYMMETRIC = np.array([0.02, 0.0], np.float32)
ASYMMETRIC = np.array([0.02, 37.0], np.float32)
GRIDS = {
    "int8_static": SYMMETRIC,
    "uint8_static": ASYMMETRIC,
    "int4_static": np.array([0.3, 0.0], np.float32),
    "uint5_static": np.array([0.15, 11.0], np.float32),
}


def codes_of(x: np.ndarray, act: str) -> np.ndarray:
    """What the kernel multiplies: int32 codes, those without a sign less half of their range."""
    scale, zero = GRIDS[act]
    bits = int(act.partition("int")[2].partition("_")[0])
    steps = np.nan_to_num(np.rint(x / scale), nan=0.0, posinf=np.inf, neginf=-np.inf)
    if act.startswith("int"):
        largest = 2 ** (bits - 1) - 1
        return np.clip(steps, -largest, largest).astype(np.int32)
    return np.clip(steps + zero, 0, 2**bits - 1).astype(np.int32) - 2 ** (bits - 1)


def oracle(x: np.ndarray, weight: Weight, act: str) -> np.ndarray:
    return float(GRIDS[act][0]) * (codes_of(x, act) @ weight.floats().T)


@pytest.mark.parametrize("act", GRIDS)
@pytest.mark.parametrize(
    ("bits", "group_size", "zeros"), [(8, 0, False), (8, 32, True), (4, 32, False), (2, 16, True)]
)
@pytest.mark.parametrize("rows", [1, 5, 40, 70])
def test_static_codes_match_oracle(
    run_node: NodeRunner, isa: str, act: str, bits: int, group_size: int, zeros: bool, rows: int
) -> None:
    # K = 131 leaves a short last group and a tail; magnitudes reach far beyond the grid.
    del isa
    weight = Weight.random(40, 131, bits=bits, group_size=group_size, zeros=zeros)
    x = 2 * activations(rows, 131)
    x[0, :3] = (math.inf, -math.inf, math.nan)
    inputs = [x, weight.packed(), None, None, GRIDS[act]]
    (y,) = run_node("QLinear", inputs, act=act, **weight.attributes())
    assert relative_error(y, oracle(x, weight, act)) < TOLERANCE


@pytest.mark.parametrize("act", GRIDS)
@pytest.mark.parametrize("rows", [1, 40])
def test_fused_layers_are_the_layers_apart(
    run_node: NodeRunner, isa: str, act: str, rows: int
) -> None:
    del isa
    weights = [Weight.random(24, 72, bits=4, group_size=32, seed=seed) for seed in (1, 2)]
    x, gain = activations(rows, 72), np.ones(72, np.float32)
    (normed,) = run_node("RmsNorm", [x, gain], epsilon=1e-5)
    attributes: dict[str, Any] = {**weights[0].attributes(), "act": act}
    apart = [
        run_node("QLinear", [normed, w.packed(), None, None, GRIDS[act]], **attributes)[0]
        for w in weights
    ]
    first, second = (w.packed() for w in weights)
    norm = {"normed": 1, "epsilon": 1e-5}
    sizes = {"count": 2, "N0": 24, "N1": 24}
    together = run_node(
        "QLinears",
        [x, gain, first, None, second, None, None, None, GRIDS[act]],
        outputs=2,
        **sizes,
        **norm,
        **{key: value for key, value in attributes.items() if key != "N"},
    )
    for found, expected in zip(together, apart, strict=True):
        np.testing.assert_array_equal(found, expected)
    (gated,) = run_node(
        "QGatedLinear",
        [x, gain, first, None, second, None, GRIDS[act]],
        kind="silu",
        **norm,
        **attributes,
    )
    (expected,) = run_node("GatedActivation", apart, kind="silu")
    np.testing.assert_array_equal(gated, expected)


@pytest.mark.parametrize(
    ("act", "grid", "message"),
    [
        ("int8_static", None, "a grid is given to static activations, and only to them"),
        ("int8_token", SYMMETRIC, "a grid is given to static activations, and only to them"),
        ("int8_static", SYMMETRIC[:1], r"the grid has shape \[1\] instead of \[2\]"),
        ("uint8_static", np.array([1, 256], np.float32), "the zero point of the grid is no code"),
    ],
)
def test_mistakes_are_named(
    run_node: NodeRunner, act: str, grid: np.ndarray | None, message: str
) -> None:
    weight = Weight.random(16, 32, bits=8, group_size=0)
    inputs = [activations(1, 32), weight.packed(), None, None, grid]
    with pytest.raises(Exception, match=message):
        run_node("QLinear", inputs, act=act, **weight.attributes())
