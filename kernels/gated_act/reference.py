"""Activations, plain and gated."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = (
    "identity",
    "relu",
    "relu2",
    "silu",
    "gelu",
    "gelu_tanh",
    "sigmoid",
    "tanh",
    "quick_gelu",
)
"""The kinds of activation that have a name."""


def gated_act(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``activation(gate) * up``, the middle of a gated feed-forward block.

    Args:
        gate: ``[..., F]``.
        up: ``[..., F]``.
        kind: One of `ACTIVATIONS`.

    Returns:
        ``[..., F]``.

    Source: Shazeer 2020 (GLU variants), equation 5.
    """
    return act(gate, kind) * up


def act(x: Tensor, kind: str) -> Tensor:
    """An activation by name.

    Args:
        x: Any shape, floating.
        kind: One of `ACTIVATIONS`.

    Returns:
        The shape of `x`.

    Raises:
        ValueError: If `kind` is unknown.
    """
    match kind:
        case "identity":
            return x.clone()
        case "relu":
            return torch.relu(x)
        case "relu2":
            return torch.relu(x).square()
        case "silu":
            return torch.nn.functional.silu(x)
        case "gelu":
            return torch.nn.functional.gelu(x)
        case "gelu_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        case "sigmoid":
            return torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
    raise ValueError(f"unknown activation {kind!r}; known: {', '.join(ACTIVATIONS)}")
