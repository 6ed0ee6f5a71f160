from __future__ import annotations

import math

import pytest
import torch

from qcompile.kernels.hadamard.matrix import core_order, has_order, largest_block, matrix
from qcompile.kernels.hadamard.reference import hadamard

PALEY = (12, 20, 28, 36, 40, 44, 52, 60, 108, 140)
WILLIAMSON = (92, 156, 172)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 64, *PALEY, *WILLIAMSON, 24, 576])
def test_matrix_of_signs_has_orthogonal_rows(n: int) -> None:
    h = matrix(n).to(torch.int64)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.int64))


def test_cores_are_the_smallest_that_leave_a_power_of_two() -> None:
    # Widths of language models: SmolLM2, Llama 2 7B, Llama 2 13B, Llama 3 and Qwen2.5 7B.
    cores = {n: core_order(n) for n in (64, 576, 1536, 11008, 13824, 14336, 18944)}
    assert cores == {64: 1, 576: 36, 1536: 12, 11008: 172, 13824: 108, 14336: 28, 18944: 148}


@pytest.mark.parametrize("n", [3, 6, 9, 18, 50])
def test_orders_that_are_no_multiple_of_four_do_not_exist(n: int) -> None:
    assert not has_order(n)
    with pytest.raises(ValueError, match=f"order {n} is known"):
        matrix(n)


def test_largest_block_divides_and_is_known() -> None:
    assert [largest_block(n) for n in (9, 18, 48, 96, 576)] == [1, 2, 48, 96, 576]
    assert largest_block(8 * 47 * 3) == 24  # 188 and 376 are not known, 564 is too large


@pytest.mark.parametrize(("n", "block"), [(16, 16), (16, 4), (24, 12), (24, 24), (40, 40)])
@pytest.mark.parametrize("transposed", [False, True])
def test_fast_product_equals_the_dense_one(n: int, block: int, transposed: bool) -> None:
    x = torch.randn(2, 3, n, dtype=torch.float64)
    h = matrix(block).to(torch.float64) / math.sqrt(block)
    blocks = [h.T if transposed else h] * (n // block)
    dense = torch.block_diag(*blocks)
    torch.testing.assert_close(hadamard(x, block, transposed), x @ dense, rtol=0, atol=1e-14)


def test_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="blocks of 4 on 6 channels"):
        hadamard(torch.zeros(6), 4, False)
