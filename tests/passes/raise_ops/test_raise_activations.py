"""Activations are named by their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.passes.raise_ops.raise_activations import RaiseActivations
from qcompile.passes.raise_ops.raise_gates import RaiseGates

Function = Callable[[Tensor], Tensor]


class Elementwise(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.proj(x).chunk(2, -1)
        return up * (gate * torch.sigmoid(gate))


def gelu_by_erf(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def gelu_by_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def wrong_constant(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.0447 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (gelu_by_erf, "gelu"),
        (gelu_by_tanh, "gelu_tanh"),
        (nn.functional.gelu, "gelu"),
        (nn.functional.silu, "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: torch.sigmoid(1.702 * x) * x, "quick_gelu"),
        (torch.relu, "relu"),
        (torch.tanh, "tanh"),
    ],
)
def test_activation_becomes_one_operator(
    function: Function, kind: str, after: Any, expect_body: Any
) -> None:
    program = after(RaiseActivations(), Elementwise(function), torch.randn(2, 3))
    expect_body(program, f"%0: f32[s0, s1] = qc.act(%x, {kind})\nreturn %0")


def test_activation_with_a_wrong_constant_keeps_its_arithmetic(after: Any) -> None:
    program = after(RaiseActivations(), Elementwise(wrong_constant), torch.randn(2, 3))

    # The hyperbolic tangent inside is one, the whole is no GELU.
    assert [node.args[1] for node in program.calls(torch.ops.qc.act.default)] == ["tanh"]
    x = torch.randn(4, 5)
    torch.testing.assert_close(program(x), wrong_constant(x))


def test_gated_activation_becomes_one_operator(after: Any, expect_body: Any) -> None:
    expect_body(
        after([RaiseActivations(), RaiseGates()], Gated(), torch.randn(2, 3, 4)),
        """
        %0: f32[s0, s1, 12] = aten.linear(%x, @proj.weight, @proj.bias)
        %1: f32[s0, s1, 6] = aten.slice(%0, -1, 0, 6, 1)
        %2: f32[s0, s1, 6] = aten.slice(%0, -1, 6, 12, 1)
        %3: f32[s0, s1, 6] = qc.gated_act(%1, %2, silu)
        return %3
        """,
    )
