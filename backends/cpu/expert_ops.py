"""The operator of the CPU library for routed experts."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.backends.cpu.activations import IntegerActivations
from qcompile.backends.cpu.ops import UnpackedWeight
from qcompile.ir import dialect
from qcompile.kernels.cpu.layout import WeightLayout
from qcompile.kernels.experts.reference import expert_hidden, expert_output


def cpu_experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    count: int,
    n: int,
    k: int,
    up_layout: str,
    down_layout: str,
    kind: str,
    gated: bool,
    limit: float,
    offset: float,
    act: str,
) -> Tensor:
    """Routed experts over packed weights; see `qc::experts`.

    Args:
        x: ``[T, k]`` float32.
        index: ``[T, choices]`` int64.
        weight: ``[T, choices]`` float32.
        up: The packed first matrices ``[n, k]``, one behind the other, uint8.
        up_bias: ``[count, n]`` or None.
        down: The packed second matrices ``[k, n]`` or, gated, ``[k, n / 2]``, uint8.
        down_bias: ``[count, k]`` or None.
        count: Number of experts.
        n: Rows of a first matrix.
        k: Input and output features.
        up_layout: How first matrices are stored, the text of a `WeightLayout`.
        down_layout: How second matrices are stored.
        kind: The activation.
        gated: Whether the first matrices hold a gate as well.
        limit: Bound of the gate and of the other half.
        offset: Added to the other half.
        act: How what both products read is rounded: ``"float"``, or `IntegerActivations` whose
            scales are measured.

    Returns:
        ``[T, k]`` float32.
    """
    inner = n // 2 if gated else n
    first = _matrices(up, count, n, k, up_layout).to(x.dtype)
    second = _matrices(down, count, k, inner, down_layout).to(x.dtype)
    read = _rounded(x, act, up_layout)
    hidden = expert_hidden(read, index, first, up_bias, kind, gated, limit, offset)
    read = _rounded(hidden, act, down_layout)
    return expert_output(read, index, weight, second, down_bias)


def _rounded(x: Tensor, act: str, layout: str) -> Tensor:
    rounding = IntegerActivations.parse(act)
    return x if rounding is None else rounding.round(x, WeightLayout.parse(layout).group_size)


def _matrices(packed: Tensor, count: int, n: int, k: int, layout: str) -> Tensor:
    """``[count, n, k]`` float32."""
    rows = torch.arange(n)
    parsed = WeightLayout.parse(layout)
    return torch.stack(
        [UnpackedWeight.of(part, n, k, parsed).rows(rows) for part in packed.chunk(count)]
    )


def _experts_shape(x: Tensor, *rest: object) -> Tensor:
    del rest
    return torch.empty_like(x)


experts = dialect.define(cpu_experts, shape=_experts_shape, differentiable=False)
