from __future__ import annotations

import pytest
import torch

from qcompile.ir import dialect

N = 24


def test_gradients_reach_input_and_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    x, scale, matrix, signs = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((3, N), (N,), (6, 6), (N,))
    )
    wanted = [value.requires_grad_() for value in (x, scale, matrix)]
    kind, dims = "compose+diagonal+hadamard+matrix", [3, 12, 0, 1]
    signs = signs.sign().to(torch.int8)

    assert torch.autograd.gradcheck(
        lambda x, scale, matrix: dialect.transform(x, [scale, signs, matrix], kind, dims), wanted
    )


def test_blocks_side_by_side_take_their_own_parameters() -> None:
    x = torch.arange(6.0)
    params = [torch.tensor([2.0, 3.0]), torch.tensor([3, 2, 1, 0])]
    found = dialect.transform(x, params, "block_diagonal+diagonal+permutation", [2, 2, 4])
    assert found.tolist() == [0.0, 3.0, 5.0, 4.0, 3.0, 2.0]


def test_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown transform 'twist'"):
        dialect.transform(torch.zeros(2), [], "twist", [])


def test_left_over_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="does not use all"):
        dialect.transform(torch.zeros(2), [torch.ones(2)], "identity", [])


def test_result_is_never_the_input_itself() -> None:
    x = torch.zeros(2)
    assert dialect.transform(x, [], "identity", []).data_ptr() != x.data_ptr()
