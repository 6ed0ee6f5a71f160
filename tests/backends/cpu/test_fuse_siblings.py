"""Layers of one input become one node: every rewrite before and after, and near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.backends.cpu.test_lower import body, capture, linear, lower, quantized, text
from torch import Tensor

from qcompile.backends.cpu.lower.fuse_linear import FuseLinear
from qcompile.backends.cpu.lower.fuse_residual import FuseResidual
from qcompile.backends.cpu.lower.fuse_siblings import FuseSiblings
from qcompile.ir import dialect
from qcompile.ir.program import Program


def fused(
    function: Callable[..., Any], granularity: str | None = None, **layers: torch.nn.Module
) -> Program:
    """``function(layers, x)`` with int4 layers, lowered and compared with what it was."""
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    before = quantized(capture(function, torch.randn(3, 32), **layers), "int4-g16", granularity)
    return lower(before, (FuseLinear(), FuseResidual(), FuseSiblings()), x)


def test_query_key_and_value_are_one_node() -> None:
    after = fused(
        lambda m, x: (m.q(x), m.k(x), m.v(x)),
        granularity="token",
        q=linear(32, 16),
        k=linear(32, 8),
        v=linear(32, 8),
    )
    assert "qc.cpu_linears(%x, None, " in body(after)
    assert "[16, 8, 8], 32, integer-4-g16-float16, int8_token, False, 0)" in body(after)


def test_norm_goes_into_the_layers_that_alone_read_it() -> None:
    def function(m: Any, x: Tensor) -> Any:
        normed = dialect.rms_norm(x, x[0] * 0 + 1, 1e-5)
        return m.k(normed), m.v(normed)

    after = fused(function, k=linear(32, 8), v=linear(32, 8))
    assert "rms_norm" not in body(after)
    assert "integer-4-g16-float16, float, True, 1e-05)" in body(after)


def test_norm_with_another_reader_stays() -> None:
    def function(m: Any, x: Tensor) -> Any:
        normed = dialect.rms_norm(x, None, 1e-5)
        return m.k(normed), m.v(normed), normed

    after = fused(function, k=linear(32, 8), v=linear(32, 8))
    assert "rms_norm" in body(after)
    assert "integer-4-g16-float16, float, False, 0)" in body(after)


def test_gate_and_up_are_one_node() -> None:
    def function(m: Any, x: Tensor) -> Any:
        normed = dialect.rms_norm(x, None, 1e-5)
        return dialect.gated_act(m.gate(normed), m.up(normed), "silu")

    after = fused(function, granularity="group", gate=linear(32, 16), up=linear(32, 16))
    assert body(after) == text("""
        %0: f32[s0, 16] = qc.cpu_gated_linear(%x, None, @gate.weight.codes.packed, @gate.bias, @up.weight.codes.packed, @up.bias, 16, 32, integer-4-g16-float16, int8_group, silu, True, 1e-05)
        return %0
        """)  # noqa: E501


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: m.a(x), id="one layer"),
        pytest.param(lambda m, x: (m.a(x), m.b(x * 2)), id="other inputs"),
        pytest.param(lambda m, x: (m.a(x), m.b(x) + x), id="residual"),
        pytest.param(lambda m, x: (m.a(x), m.wide(x)), id="other bias"),
    ],
)
def test_layers_that_differ_stay_apart(function: Callable[..., Any]) -> None:
    after = fused(function, a=linear(32, 32), b=linear(32, 32), wide=linear(32, 64, bias=False))
    assert "cpu_linears" not in body(after)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda m, x: dialect.gated_act(m.a(x), m.b(x), "relu2"), id="activation"),
        pytest.param(lambda m, x: dialect.gated_act(m.a(x), m.b(x * 2), "silu"), id="inputs"),
        pytest.param(lambda m, x: (dialect.gated_act(y := m.a(x), m.b(x), "silu"), y), id="reader"),
        pytest.param(lambda m, x: dialect.gated_act(y := m.a(x), y, "silu"), id="one layer twice"),
    ],
)
def test_gates_that_do_not_fit_stay(function: Callable[..., Any]) -> None:
    after = fused(function, a=linear(32, 16), b=linear(32, 16))
    assert "cpu_gated_linear" not in body(after)
    assert "gated_act" in body(after)
