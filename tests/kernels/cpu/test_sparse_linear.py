"""Floats beside codes: the operator against the reference of its lowered node."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.kernels.cpu.conftest import drawn

from qcompile.backends.cpu.sparse_linear import cpu_sparse_linear, pack_side, unpack_side
from qcompile.formats.split import index_dtype


def side(n: int, k: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    index = torch.stack([torch.randperm(k, generator=generator)[:count] for _ in range(n)])
    values = torch.randn(n, count, generator=generator).to(torch.float16)
    return index.sort(dim=-1).values.to(index_dtype(k)), values


@pytest.mark.parametrize(("n", "k", "count"), [(1, 1, 1), (13, 36, 5), (3, 40_000, 2)])
def test_packing_is_undone_and_of_true_size(n: int, k: int, count: int) -> None:
    index, values = side(n, k, count)
    packed = pack_side(index, values)
    assert len(packed) == n * count * (2 if k <= 32768 else 4) + n * count * 2
    unpacked = unpack_side(packed, n, k, count)
    assert torch.equal(unpacked[0], index)
    assert torch.equal(unpacked[1], values)


@pytest.mark.parametrize(
    ("shape", "n", "count"),
    [((1, 100), 13, 3), ((2, 3, 576), 40, 29), ((4, 36), 1, 36), ((2, 40_000), 5, 7)],
)
def test_products_match_the_reference(run_node, shape: tuple[int, ...], n: int, count: int) -> None:
    k = shape[-1]
    x, addend = drawn(*shape), drawn(*shape[:-1], n)
    packed = pack_side(*side(n, k, count))
    (y,) = run_node("SparseLinear", [x, packed.numpy(), addend], N=n, K=k, count=count)
    expected = cpu_sparse_linear(
        torch.from_numpy(x).double(), packed, torch.from_numpy(addend).double(), n, k, count
    )
    # Sums of up to 36 float32 terms of size 1.
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=2e-5)


def test_products_are_the_same_for_every_number_of_threads(assert_same_on_two_threads) -> None:
    inputs = [drawn(40, 576), pack_side(*side(300, 576, 20)).numpy(), drawn(40, 300)]
    assert_same_on_two_threads("SparseLinear", inputs, N=300, K=576, count=20)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"K": 30}, "x has shape"),
        ({"N": 7}, "the packed weight has shape"),
        ({"count": 5}, "the packed weight has shape"),
        ({"count": 0}, "count = 0 is none of 1 to 32"),
        ({"count": 33}, "count = 33 is none of 1 to 32"),
        ({"N": 0}, "are no size of a weight"),
    ],
)
def test_what_does_not_fit_is_refused(run_node, changed: dict[str, int], message: str) -> None:
    inputs = [drawn(2, 32), pack_side(*side(8, 32, 4)).numpy(), drawn(2, 8)]
    with pytest.raises(Exception, match=f"the_node.*({message})"):
        run_node("SparseLinear", inputs, **{"N": 8, "K": 32, "count": 4, **changed})


def test_column_that_the_weight_does_not_have_is_refused(run_node) -> None:
    index, values = side(8, 32, 4)
    index[5, 2] = 32
    inputs = [drawn(2, 32), pack_side(index, values).numpy(), drawn(2, 8)]
    with pytest.raises(Exception, match="the packed weight has column 32 of 32"):
        run_node("SparseLinear", inputs, N=8, K=32, count=4)
    index[5, 2] = -1  # 65,535 as the kernel reads it
    inputs[1] = pack_side(index, values).numpy()
    with pytest.raises(Exception, match="the packed weight has column 65535 of 32"):
        run_node("SparseLinear", inputs, N=8, K=32, count=4)


def test_sum_of_another_shape_is_refused(run_node) -> None:
    inputs = [drawn(2, 32), pack_side(*side(8, 32, 4)).numpy(), drawn(2, 9)]
    with pytest.raises(Exception, match="what is added to has shape"):
        run_node("SparseLinear", inputs, N=8, K=32, count=4)
