"""QLinears and QGatedLinear against the operators that they stand for, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.kernels.cpu.conftest import NodeRunner

from qcompile.kernels.cpu.layout import pack_linear

K, GROUP, EPSILON = 72, 32, 1e-5
SIZES = (40, 16, 24)


def pack(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (n, K), dtype=np.uint8)
    scale = rng.uniform(0.01, 0.02, (n, -(-K // GROUP))).astype(np.float16).astype(np.float32)
    return pack_linear(codes, scale, bits=4, group_size=GROUP)


def layout(act: str) -> dict[str, Any]:
    return {"K": K, "bits": 4, "group_size": GROUP, "scale_dtype": 1, "act": act}


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("act", ["float", "int8_token", "int8_group"])
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("normed", [False, True])
def test_layers_together_are_the_layers_apart(
    isa: str, run_node: NodeRunner, act: str, rows: int, normed: bool
) -> None:
    del isa
    x, gain = floats(rows, K), floats(K)
    weights = [pack(n, seed) for seed, n in enumerate(SIZES)]
    biases = [floats(n) for n in SIZES]
    (read,) = run_node("RmsNorm", [x, gain], epsilon=EPSILON) if normed else (x,)
    apart = [
        run_node("QLinear", [read, weight, bias], N=n, **layout(act))[0]
        for weight, bias, n in zip(weights, biases, SIZES, strict=True)
    ]
    layers = [operand for pair in zip(weights, biases, strict=True) for operand in pair]
    together = run_node(
        "QLinears",
        [x, gain if normed else None, *layers],
        outputs=3,
        count=3,
        N0=SIZES[0],
        N1=SIZES[1],
        N2=SIZES[2],
        normed=int(normed),
        epsilon=EPSILON,
        **layout(act),
    )
    for found, expected in zip(together, apart, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("act", ["float", "int8_token"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("gain", [None, floats(K)], ids=["bare", "gain"])
def test_gated_layer_is_its_parts(
    isa: str, run_node: NodeRunner, act: str, rows: int, gain: np.ndarray | None
) -> None:
    del isa
    x, n = floats(rows, K), SIZES[0]
    gate, up, bias = pack(n, 1), pack(n, 2), floats(n)
    (read,) = run_node("RmsNorm", [x, gain], epsilon=EPSILON)
    parts = [
        run_node("QLinear", [read, gate, bias], N=n, **layout(act))[0],
        run_node("QLinear", [read, up], N=n, **layout(act))[0],
    ]
    (expected,) = run_node("GatedActivation", parts, kind="silu")
    (found,) = run_node(
        "QGatedLinear",
        [x, gain, gate, bias, up],
        N=n,
        kind="silu",
        normed=1,
        epsilon=EPSILON,
        **layout(act),
    )
    np.testing.assert_array_equal(found, expected)


def test_results_do_not_depend_on_threads(isa: str, run_node: NodeRunner) -> None:
    del isa
    x, n = np.tile(floats(40, K), (25, 1)), SIZES[0]  # enough work to be shared
    operands = [x, None, pack(n, 1), None, pack(n, 2)]
    options = {"N": n, "kind": "gelu", **layout("int8_token")}
    one, two = (run_node("QGatedLinear", operands, threads=t, **options)[0] for t in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 4}, "count = 4 is not 1 to 3"),
        ({"count": 2, "N1": 16}, "weight 1 is missing"),
        ({"N0": 24}, r"packed weight has shape \[\d+\] instead of"),
        ({"epsilon": -1.0}, "epsilon is negative"),
        ({"normed": 0}, "norm_weight is given, but normed is 0"),
    ],
)
def test_mistakes_are_named(run_node: NodeRunner, change: dict[str, Any], message: str) -> None:
    options = {"count": 1, "N0": SIZES[0], "normed": 1, "epsilon": EPSILON, **layout("float")}
    with pytest.raises(Exception, match=message):
        run_node("QLinears", [floats(2, K), floats(K), pack(SIZES[0], 0)], **options | change)
