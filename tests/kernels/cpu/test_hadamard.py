"""The Hadamard operator against the oracle in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qcompile.kernels.hadamard.matrix import core, core_order
from qcompile.kernels.hadamard.reference import hadamard


def core_of(block: int, transposed: bool) -> np.ndarray | None:
    order = core_order(block)
    assert order is not None
    if order == 1:
        return None
    factor = core(order).to(torch.float32)
    return (factor.T if transposed else factor).contiguous().numpy()


@pytest.mark.parametrize(
    ("n", "block"),
    [(1, 1), (8, 4), (16, 16), (64, 64), (96, 32), (1536, 1536), (576, 576), (40, 20), (36, 36)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_hadamard_matches_the_oracle(run_node, isa, n, block, transposed) -> None:
    x = np.random.default_rng(n).standard_normal((2, 3, n)).astype(np.float32)
    matrix = core_of(block, transposed)
    (y,) = run_node("Hadamard", [x] if matrix is None else [x, matrix], block=block)
    expected = hadamard(torch.from_numpy(x).double(), block, transposed).numpy()
    # Sums of up to 1,536 float32 terms of size 1, scaled by 1 / sqrt(block).
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5)


def test_hadamard_is_the_same_for_every_number_of_threads(make_session, isa) -> None:
    x = np.random.default_rng(0).standard_normal((300, 1536)).astype(np.float32)
    matrix = core_of(1536, False)
    one, two = (
        make_session("Hadamard", [x, matrix], threads=threads, block=1536).run(
            None, {"x0": x, "x1": matrix}
        )[0]
        for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("x", "matrix", "block", "message"),
    [
        ((2, 6), None, 4, "which blocks of 4 do not divide"),
        ((2, 12), None, 12, "not a power of two times the core's order, 1"),
        ((2, 24), (12, 11), 24, "which is not square"),
        ((2, 6), (6, 6), 6, "no Hadamard matrix has order 6"),
        ((2, 4), None, 0, "block = 0 is no order"),
    ],
)
def test_hadamard_refuses_what_does_not_fit(run_node, x, matrix, block, message) -> None:
    inputs = [np.zeros(shape, np.float32) for shape in (x, matrix) if shape is not None]
    with pytest.raises(Exception, match=f"the_node.*{message}"):
        run_node("Hadamard", inputs, block=block)
