"""Routed experts in the form that transformers calls, as one operator while tracing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.dialect import ACTIVATIONS, act

_TOLERANCE = 1e-10  # relative, in float64


def experts_of(model: nn.Module) -> Callable[..., Tensor]:
    """An implementation of experts for transformers' registry, good for one model.

    What each module's gate computes is found out now: while tracing, nothing can be run.
    """
    gates = {
        module: find_gate(module) if module.has_gate else _find_plain(module)
        for module in model.modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    }

    def forward(
        module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        gate = gates.get(module)
        if gate is None or getattr(module, "has_post_expert_norm", False):
            return _by_token(module, hidden_states, top_k_index, top_k_weights)
        return _as_one_operator(module, gate, hidden_states, top_k_index, top_k_weights)

    return forward


def _as_one_operator(
    layout: Any, gate: Gate, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The experts of one layer, whatever layout the module keeps its weights in."""
    gated = bool(layout.has_gate)
    up = layout.gate_up_proj if gated else layout.up_proj
    down = layout.down_proj
    up_bias = down_bias = None
    if layout.has_bias:
        up_bias = layout.gate_up_proj_bias if gated else layout.up_proj_bias
        down_bias = layout.down_proj_bias
    if layout.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if gate.interleaved:
        up = _halves(up)
        up_bias = None if up_bias is None else _halves(up_bias)
    result: Tensor = torch.ops.qc.experts(
        hidden_states,
        top_k_index,
        top_k_weights.to(hidden_states.dtype),
        up,
        up_bias,
        down,
        down_bias,
        gate.kind,
        gated,
        gate.limit,
        gate.offset,
    )
    return result


@dataclass(frozen=True)
class Gate:
    """What a module does between its two projections; see `qc::experts`.

    Attributes:
        kind: The activation.
        interleaved: Whether gate and other half alternate, instead of following each other.
        limit: Where the halves are clamped; 0 is nowhere.
        offset: Added to the half that is no gate.
    """

    kind: str
    interleaved: bool
    limit: float
    offset: float


def find_gate(module: Any) -> Gate | None:
    """Finds out by probing what ``module._apply_gate`` computes.

    Returns:
        None if it is none of the gates that `qc::experts` knows.
    """
    width = 4
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        g, u = (3 * torch.randn(7, width, generator=generator, dtype=torch.float64) for _ in "gu")
        for interleaved in (False, True):

            def run(gate: Tensor, other: Tensor, pairs: bool = interleaved) -> Tensor:
                joined = (
                    torch.stack((gate, other), -1).flatten(-2)
                    if pairs
                    else torch.cat((gate, other), -1)
                )
                value: Tensor = module._apply_gate(joined)
                return value

            found = _fit(run, g, u)
            if found is not None:
                return Gate(found[0], interleaved, *found[1:])
    return None


def _fit(run: Any, gate: Tensor, other: Tensor) -> tuple[str, float, float] | None:
    """Kind, limit and offset: the gate is affine in its other half until it is clamped."""
    zero = torch.zeros_like(other)
    slope = run(gate.abs() / 10, zero + 1e-3) - run(gate.abs() / 10, zero)
    ratio = run(gate.abs() / 10, zero) * 1e-3 / slope
    offset = round(float(ratio.median()), 6)
    far = run(gate, zero + 1e9) / (run(gate, zero + 1e-3) - run(gate, zero)) * 1e-3
    reach = float(far.median()) - offset
    limit = round(reach, 6) if reach < 1e6 else 0.0
    for kind in ACTIVATIONS:
        agrees = True
        for scale in (1.0, 10.0):
            a, b = scale * gate, scale * other
            bound = limit or float("inf")
            expected = act(a.clamp(max=bound), kind) * (b.clamp(-bound, bound) + offset)
            agrees &= _close(run(a, b), expected)
        if agrees:
            return kind, limit, offset
    return None


def _find_plain(module: Any) -> Gate | None:
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x = 3 * torch.randn(7, 4, generator=generator, dtype=torch.float64)
        value = module.act_fn(x)
        for kind in ACTIVATIONS:
            if _close(value, act(x, kind)):
                return Gate(kind, False, 0.0, 0.0)
    return None


def _by_token(module: nn.Module, *arguments: Tensor) -> Tensor:
    """Transformers' own form with each token's weights gathered: any gate, and a barrier for us."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    result: Tensor = ALL_EXPERTS_FUNCTIONS["batched_mm"](module, *arguments)
    return result


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not bool(torch.isfinite(found).all()):
        return False
    return float((found - expected).abs().max()) <= _TOLERANCE * float(expected.abs().max())


def _halves(stacked: Tensor) -> Tensor:
    """Rows 0, 2, 4, ... of each expert, then rows 1, 3, 5, ..."""
    return torch.cat((stacked[:, 0::2], stacked[:, 1::2]), dim=1)
