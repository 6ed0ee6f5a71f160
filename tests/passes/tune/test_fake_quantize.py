from __future__ import annotations

import torch
from torch import Tensor

from qcompile.passes.tune.fake_quantize import fake_quantize, quantized_codes, straight_through

TOP = 7


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values that are clamped at either end and others, offsets, scales, zero points."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 16, generator=generator)
    offset = torch.rand(6, 16, generator=generator) - 0.5
    scale = torch.tensor([0.3, -0.2, 0.1, -0.5, 0.25, 0.7]).unsqueeze(1)
    zero_point = torch.tensor([4.0, 4, 0, 3, 7, 2]).unsqueeze(1)
    return values, offset, scale, zero_point


def by_small_steps(values: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    steps = values / scale + offset
    codes = straight_through(steps, steps.round()) + zero_point
    return (codes.clamp(0, TOP) - zero_point) * scale


def test_value_is_what_codes_decode_to() -> None:
    values, offset, scale, zero_point = operands()
    codes = quantized_codes(values, offset, scale, zero_point, TOP)
    decoded = (codes.to(torch.float32) - zero_point) * scale
    assert codes.dtype == torch.uint8
    assert codes.min() == 0
    assert codes.max() == TOP
    assert torch.equal(fake_quantize(values, offset, scale, zero_point, TOP), decoded)


def test_gradients_are_those_of_single_operators() -> None:
    weighting = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (lambda *x: fake_quantize(*x, TOP), by_small_steps):
        leaves = [operand.clone().requires_grad_() for operand in operands()]
        gradients.append(torch.autograd.grad((function(*leaves) * weighting).sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        # Sums over 16 products of numbers near 1, in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_nothing_is_asked_for_what_needs_no_gradient() -> None:
    values, _, scale, zero_point = operands()
    leaf = scale.requires_grad_()
    (found,) = torch.autograd.grad(fake_quantize(values, None, leaf, zero_point, TOP).sum(), leaf)
    assert found.shape == scale.shape


def test_straight_through_takes_one_value_and_the_others_gradient() -> None:
    soft, hard = torch.tensor([0.4, 1.6], requires_grad=True), torch.tensor([0.0, 2.0])
    result = straight_through(soft, hard)
    assert torch.equal(result, hard)
    (found,) = torch.autograd.grad((result * torch.tensor([3.0, 5.0])).sum(), soft)
    assert found.tolist() == [3.0, 5.0]
