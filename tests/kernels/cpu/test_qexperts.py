"""QExperts against the oracle: any routing, any gate, and what is wrong is said in words."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tests.kernels.cpu.conftest import NodeRunner, product_tolerance

from qcompile.kernels.cpu.layout import pack_linear
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.experts.reference import expert_hidden, expert_output, experts
from qcompile.kernels.quantize.reference import dynamic_scale, quantize

COUNT, WIDTH, INNER = 5, 40, 24
EXACT = product_tolerance("scalar", "float", 1)
"""Of max |value|: float32 sums of 40 and 24 products in other orders."""

ATTRIBUTES = {"up_bits": 4, "up_group_size": 16, "down_bits": 6, "down_group_size": 0}


class Matrices:
    """Stacked matrices, packed and decoded."""

    def __init__(
        self, n: int, k: int, bits: int, group_size: int, zeros: Literal["uint8", "float16"]
    ) -> None:
        rng = np.random.default_rng(n + k)
        groups = -(-k // group_size) if group_size else 1
        shape = (COUNT, n, groups)
        codes = rng.integers(0, 2**bits, (COUNT, n, k), dtype=np.uint8)
        scale = rng.uniform(0.01, 0.05, shape).astype(np.float16).astype(np.float32)
        points = rng.integers(0, 2**bits, shape).astype(zeros)
        if zeros == "float16":
            points += rng.uniform(0, 1, shape).astype(np.float16)
        packed = [
            pack_linear(
                codes[i],
                scale[i],
                points[i],
                bits=bits,
                group_size=group_size,
            )
            for i in range(COUNT)
        ]
        self.packed = np.concatenate(packed)
        self.values = dequantize(
            torch.from_numpy(codes),
            torch.from_numpy(scale),
            torch.from_numpy(points),
            bits,
            group_size,
        )


def attributes(gated: bool, **others: Any) -> dict[str, Any]:
    return {
        "count": COUNT,
        "up_N": 2 * INNER if gated else INNER,
        "up_K": WIDTH,
        "down_N": WIDTH,
        "down_K": INNER,
        "up_scale_dtype": 1,
        "down_scale_dtype": 1,
        "up_has_zero_point": 1,
        "down_has_zero_point": 1,
        "down_float_zero_point": 1,
        "gated": int(gated),
        **ATTRIBUTES,
        **others,
    }


def matrices(gated: bool) -> tuple[Matrices, Matrices]:
    up = Matrices(2 * INNER if gated else INNER, WIDTH, 4, 16, "uint8")
    return up, Matrices(WIDTH, INNER, 6, 0, "float16")


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def routing(rows: int, choices: int = 2) -> np.ndarray:
    """Experts of each row, some of them numbers that name none."""
    return np.random.default_rng(rows).integers(0, COUNT + 1, (rows, choices))


def reference(
    x: np.ndarray, index: np.ndarray, weight: np.ndarray, pair: Any, biases: Any, *gate: Any
) -> np.ndarray:
    up_bias, down_bias = (None if b is None else torch.from_numpy(b) for b in biases)
    operands = (torch.from_numpy(x), torch.from_numpy(index), torch.from_numpy(weight))
    found = experts(*operands, pair[0].values, up_bias, pair[1].values, down_bias, *gate)
    return np.asarray(found)


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float = EXACT) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("rows", [1, 7, 300, 1200])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_match_oracle(isa: str, run_node: NodeRunner, rows: int, biased: bool) -> None:
    pair = matrices(gated=True)
    x, index, weight = floats(rows, WIDTH), routing(rows), floats(rows, 2)
    biases = (floats(COUNT, 2 * INNER), floats(COUNT, WIDTH)) if biased else (None, None)
    (found,) = run_node(
        "QExperts",
        [x, index, weight, pair[0].packed, biases[0], pair[1].packed, biases[1]],
        threads=2,
        kind="silu",
        **attributes(True),
    )
    expected = reference(x, index, weight, pair, biases, "silu", True, 0.0, 0.0)
    assert_near(found, expected, product_tolerance(isa, "float", rows))


@pytest.mark.parametrize(
    ("kind", "gated", "limit", "offset"),
    [
        ("quick_gelu", True, 0.7, 1.0),
        ("gelu_tanh", True, 0.0, 0.0),
        ("relu2", True, 0.0, 0.0),
        ("relu2", False, 0.0, 0.0),
        ("quick_gelu", False, 0.0, 0.0),
        ("gelu", False, 0.0, 0.0),
        ("identity", False, 0.0, 0.0),
    ],
)
def test_every_gate_matches_oracle(
    run_node: NodeRunner, kind: str, gated: bool, limit: float, offset: float
) -> None:
    pair = matrices(gated)
    x, index, weight = floats(9, WIDTH), routing(9), floats(9, 2)
    (found,) = run_node(
        "QExperts",
        [x, index, weight, pair[0].packed, None, pair[1].packed],
        kind=kind,
        limit=limit,
        offset=offset,
        **attributes(gated),
    )
    expected = reference(x, index, weight, pair, (None, None), kind, gated, limit, offset)
    assert_near(found, expected)


@pytest.mark.parametrize(("act", "groups"), [("int8_token", (0, 0)), ("int8_group", (16, 0))])
@pytest.mark.parametrize("rows", [1, 9, 300])
def test_both_products_round_what_they_read(
    isa: str, run_node: NodeRunner, act: str, groups: tuple[int, int], rows: int
) -> None:
    pair = matrices(gated=True)
    x, index, weight = floats(rows, WIDTH), routing(rows), floats(rows, 2)
    (found,) = run_node(
        "QExperts",
        [x, index, weight, pair[0].packed, None, pair[1].packed],
        act=act,
        **attributes(True),
    )
    chosen = torch.from_numpy(index)
    read = _rounded(torch.from_numpy(x), groups[0])
    hidden = expert_hidden(read, chosen, pair[0].values, None, "silu", True, 0.0, 0.0)
    read = _rounded(hidden, groups[1])
    expected = expert_output(read, chosen, torch.from_numpy(weight), pair[1].values, None).numpy()
    errors = np.abs(found - expected) / np.abs(expected).max()
    # A hidden value on the edge between two codes may fall to either side: 1/127 of the largest.
    assert np.median(errors) <= product_tolerance(isa, act, rows)
    assert errors.max() <= 1e-2


def _rounded(x: torch.Tensor, group_size: int) -> torch.Tensor:
    scale = dynamic_scale(x, 8, group_size)
    return dequantize(quantize(x, scale, None, 8, group_size), scale, None, 8, group_size)


def test_rows_without_an_expert_are_zero(run_node: NodeRunner) -> None:
    pair = matrices(gated=True)
    index = np.full((3, 2), COUNT)
    (found,) = run_node(
        "QExperts",
        [floats(3, WIDTH), index, floats(3, 2), pair[0].packed, None, pair[1].packed],
        **attributes(True),
    )
    assert not found.any()


def test_threads_do_not_change_a_bit(run_node: NodeRunner) -> None:
    pair = matrices(gated=True)
    x, index, weight = floats(513, WIDTH), routing(513), floats(513, 2)
    operands = [x, index, weight, pair[0].packed, None, pair[1].packed]
    one, two = (
        run_node("QExperts", operands, threads=threads, **attributes(True))[0] for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up_K": 48}, "do not follow one another"),
        ({"count": 0}, "no number of experts"),
        ({"count": 4}, "the packed weights have shape"),
        ({"down_bits": 9}, "bits = 9 is not supported"),
        ({"kind": "softplus"}, "is none of silu"),
        ({"act": "int8_static"}, "experts have no static activations"),
        ({"act": "int9_token"}, "is none of 'float'"),
    ],
)
def test_what_does_not_fit_is_refused(
    run_node: NodeRunner, changes: dict[str, Any], message: str
) -> None:
    pair = matrices(gated=True)
    operands = [floats(3, WIDTH), routing(3), floats(3, 2), pair[0].packed, None, pair[1].packed]
    with pytest.raises(Exception, match=message):  # onnxruntime's exceptions have no common base
        run_node("QExperts", operands, **attributes(True, **changes))


def test_routing_of_other_rows_is_refused(run_node: NodeRunner) -> None:
    pair = matrices(gated=True)
    operands = [floats(3, WIDTH), routing(4), floats(4, 2), pair[0].packed, None, pair[1].packed]
    with pytest.raises(
        ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="there are 3 rows"
    ):
        run_node("QExperts", operands, **attributes(True))
