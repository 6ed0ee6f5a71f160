"""Normalizations are recognized by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.passes.raise_ops.raise_norms import RaiseNorms

WIDTH = 8


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.bias = nn.Parameter(torch.randn(WIDTH))


class MeanSquare(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class MeanSquareByDivision(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) / WIDTH + 1e-6) * self.gain


class MeanSquareByPower(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).pow(-0.5) * (1 + self.gain)


class Centred(Norm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * self.gain + self.bias


class Native(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,), self.gain, self.bias, 1e-5)


class WrongMean(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) / (WIDTH - 1) + 1e-6)


class OtherPower(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.abs().pow(2.01).mean(-1, keepdim=True) + 1e-6)


class HalfCentred(Norm):
    def forward(self, x: Tensor) -> Tensor:
        centred = x - 0.5 * x.mean(-1, keepdim=True)
        return x * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6)


class OtherValue(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (MeanSquare(), "qc.rms_norm(%x, @gain, 1e-06)"),
        (MeanSquareByDivision(), "qc.rms_norm(%x, @gain, 1e-06)"),
        (MeanSquareByPower(), "qc.rms_norm(%x, @gain, 1e-06)"),
        (Centred(), "qc.layer_norm(%x, @gain, @bias, 1e-05)"),
        (Native(), "qc.layer_norm(%x, @gain, @bias, 1e-05)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_norm_becomes_one_operator(
    model: nn.Module, call: str, after: Any, expect_body: Any
) -> None:
    program = after(RaiseNorms(), model, torch.randn(2, 3, WIDTH))

    expect_body(program, f"%0: f32[s0, s1, 8] = {call}\nreturn %0")
    x = torch.randn(4, 5, WIDTH)
    torch.testing.assert_close(program(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model", [WrongMean(), OtherPower(), HalfCentred(), OtherValue()])
def test_what_is_almost_a_norm_is_left(model: nn.Module, after: Any) -> None:
    program = after(RaiseNorms(), model, torch.randn(2, 3, WIDTH))

    assert "qc." not in program.text()
    x = torch.randn(4, 5, WIDTH)
    torch.testing.assert_close(program(x), model(x))


def test_gain_with_other_users_of_the_core_stays_outside(after: Any, expect_body: Any) -> None:
    class TwoUsers(Norm):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            core = nn.functional.rms_norm(x, (WIDTH,), None, 1e-6)
            return core * self.gain, core

    expect_body(
        after(RaiseNorms(), TwoUsers(), torch.randn(2, 3, WIDTH)),
        """
        %0: f32[s0, s1, 8] = qc.rms_norm(%x, None, 1e-06)
        %1: f32[s0, s1, 8] = aten.mul(%0, @gain)
        return %1, %0
        """,
    )
