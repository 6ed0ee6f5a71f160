from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.passes.tune.narrow_products import has_narrow_products, narrow_linear


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 24), (16, 24), (16,))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def test_value_and_gradients_are_those_of_a_linear_to_three_digits() -> None:
    weighting = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (narrow_linear, functional.linear):
        given = operands()
        value = function(*given)
        gradients = torch.autograd.grad((value * weighting).sum(), given)
        results.append((value.detach(), *gradients))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == torch.float32
        # Each factor is off by 2^-9 at most, and errors of single products cancel in part.
        assert (found - expected).norm() < 2**-8 * expected.norm()


def test_numbers_that_bfloat16_holds_are_multiplied_exactly() -> None:
    x, weight = torch.tensor([[1.0, 2, 3]]), torch.tensor([[4.0, 5, 6], [7, 8, 9]])
    assert narrow_linear(x, weight).tolist() == [[32.0, 50.0]]


def test_instructions_are_looked_for_by_name(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert not has_narrow_products()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert has_narrow_products()
