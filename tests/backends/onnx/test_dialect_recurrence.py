"""Convolutions and recurrences along a text in standard ONNX give what their references give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompile.ir.dialect  # noqa: F401  (defines the operators)

qc = torch.ops.qc


def matrices(length: int) -> tuple[Tensor, ...]:
    """Queries of 2 groups, values of 4 heads, a decay of each row, and a state, of two texts."""
    decay = -torch.rand(2, length, 4, 8)
    return (
        torch.randn(2, length, 2, 8),
        torch.randn(2, length, 4, 6),
        decay,
        torch.randn(2, 4, 8, 6),
    )


def channels(length: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 6, length), torch.randn(6, 4), torch.randn(6)


def fixed(function: Callable[..., Any], *sizes: tuple[int, ...]) -> Callable[..., Any]:
    """The function, of inputs whose last sizes do not vary."""

    def checked(*inputs: Tensor) -> Any:
        for x, last in zip(inputs, sizes, strict=True):
            assert tuple(x.shape[x.dim() - len(last) :]) == last
        return function(*inputs)

    return checked


def heads(function: Callable[..., Any]) -> Callable[..., Any]:
    return fixed(function, (2, 8), (4, 6), (4, 8), (4, 8, 6))


CASES = {
    "causal_conv": (fixed(qc.causal_conv, (), (6, 4), (6,)), channels),
    "causal_conv_without_bias": (
        fixed(lambda x, w, _: qc.causal_conv(x, w, None), (), (6, 4), (6,)),
        channels,
    ),
    "recurrence": (
        heads(lambda q, v, d, s: qc.linear_recurrence(q, q.sin(), v, d, None, s)),
        matrices,
    ),
    "recurrence_of_one_decay": (
        heads(lambda q, v, d, s: qc.linear_recurrence(q, q.sin(), v, d[..., :1], None, s)),
        matrices,
    ),
    "recurrence_with_a_rate": (
        heads(
            lambda q, v, d, s: qc.linear_recurrence(q, 0.3 * q.sin(), v, d, v.mean(-1).sigmoid(), s)
        ),
        matrices,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_along_a_text_equals_its_reference(onnx: Any, name: str) -> None:
    function, inputs = CASES[name]
    onnx.check(function, inputs, sizes=(4, 1, 9), atol=1e-5)


def test_recurrence_in_two_parts_equals_the_whole() -> None:
    query, value, decay, state = matrices(7)
    rate = value.mean(-1).sigmoid()

    def run(part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        inputs = (query[:, part], query[:, part].sin(), value[:, part], decay[:, part])
        out, after = qc.linear_recurrence(*inputs, rate[:, part], state)
        return out, after

    whole, final = run(slice(7), state)
    first, between = run(slice(3), state)
    second, after = run(slice(3, 7), between)

    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(after, final)
