from __future__ import annotations

import pytest
import torch

from qcompile.passes.transform.values import Diagonal, Orthogonal, Permutation, Transform

N = 5


def values() -> dict[str, Transform]:
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(N, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(N, N, generator=generator, dtype=torch.float64))
    return {
        "diagonal": Diagonal(scale),
        "permutation": Permutation(torch.tensor([2, 0, 4, 1, 3])),
        "orthogonal": Orthogonal(q),
    }


@pytest.mark.parametrize("kind", values())
def test_inverse_undoes_and_dual_is_the_inverse_transposed(kind: str) -> None:
    value = values()[kind]
    identity = torch.eye(N, dtype=torch.float64)
    matrix = value.matrix()
    torch.testing.assert_close(matrix @ value.inverse().matrix(), identity, rtol=0, atol=1e-14)
    torch.testing.assert_close(matrix @ value.dual().matrix().T, identity, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", values())
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_apply_is_the_product_with_the_matrix_along_an_axis(kind: str, axis: int) -> None:
    value = values()[kind]
    x = torch.randn(N, N, N, dtype=torch.float64)
    expected = torch.tensordot(x, value.matrix(), dims=([axis], [0])).movedim(-1, axis)
    torch.testing.assert_close(value.apply(x, axis), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", values())
def test_order_is_that_of_the_matrix(kind: str) -> None:
    assert values()[kind].size == N
