"""Operators of the CPU library that stand for several layers of one input.

Each reference is the composition that one node of ``com.qcompile`` computes, bit for bit on the
same instruction set: norm, rounding and products are those of the single operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.backends.cpu.ops import cpu_linear
from qcompile.ir import dialect
from qcompile.kernels.gated_act.reference import gated_act
from qcompile.kernels.rms_norm.reference import rms_norm

MOST_LAYERS = 3
"""Layers that one `linears` can hold: query, key and value."""


def cpu_linears(
    x: Tensor,
    norm_weight: Tensor | None,
    packed: list[Tensor],
    biases: list[Tensor],
    sizes: list[int],
    k: int,
    layout: str,
    act: str,
    normed: bool,
    epsilon: float,
    grid: Tensor | None = None,
) -> list[Tensor]:
    """Linear layers of one input, which may be normed first: ``linear_i(rms_norm(x))``.

    Args:
        x: ``[..., k]`` float32.
        norm_weight: Gain ``[k]`` of the norm, or None.
        packed: Up to `MOST_LAYERS` packed weights of one layout.
        biases: One ``[size]`` for each weight, or none at all.
        sizes: Output features of each weight.
        k: Input features.
        layout: How every weight is stored, as for `cpu_linear`.
        act: How the (normed) input is rounded.
        normed: Whether the norm comes first.
        epsilon: Of the norm.
        grid: Of static codes, as for `cpu_linear`.

    Returns:
        ``[..., size]`` float32 for each weight.
    """
    if normed:
        x = rms_norm(x, norm_weight, epsilon)
    added: Sequence[Tensor | None] = biases or (None,) * len(packed)
    return [
        cpu_linear(x, weight, bias, None, size, k, layout, act, grid)
        for weight, bias, size in zip(packed, added, sizes, strict=True)
    ]


def cpu_gated_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    n: int,
    k: int,
    layout: str,
    act: str,
    kind: str,
    normed: bool,
    epsilon: float,
    grid: Tensor | None = None,
) -> Tensor:
    """The first half of a gated feed-forward block: ``activation(gate(x)) * up(x)``.

    Args:
        x: ``[..., k]`` float32.
        norm_weight: As for `cpu_linears`.
        gate: Packed weight of the layer that is activated.
        gate_bias: ``[n]`` or None.
        up: Packed weight of the layer that is multiplied, of the same layout.
        up_bias: ``[n]`` or None.
        n: Output features.
        k: Input features.
        layout: How every weight is stored, as for `cpu_linear`.
        act: How the (normed) input is rounded.
        kind: The activation, as for `qc.gated_act`.
        normed: Whether an RMS norm comes first.
        epsilon: Of the norm.
        grid: Of static codes, as for `cpu_linear`.

    Returns:
        ``[..., n]`` float32.
    """
    if normed:
        x = rms_norm(x, norm_weight, epsilon)
    gated = cpu_linear(x, gate, gate_bias, None, n, k, layout, act, grid)
    return gated_act(gated, cpu_linear(x, up, up_bias, None, n, k, layout, act, grid), kind)


def _linears_shape(
    x: Tensor,
    norm_weight: Tensor | None,
    packed: list[Tensor],
    biases: list[Tensor],
    sizes: list[int],
    *rest: object,
) -> list[Tensor]:
    del norm_weight, packed, biases, rest
    return [x.new_empty((*x.shape[:-1], size)) for size in sizes]


def _gated_linear_shape(x: Tensor, *rest: object) -> Tensor:
    n = rest[5]
    assert isinstance(n, int)
    return torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)


linears = dialect.define(cpu_linears, shape=_linears_shape, differentiable=False)
gated_linear = dialect.define(cpu_gated_linear, shape=_gated_linear_shape, differentiable=False)
