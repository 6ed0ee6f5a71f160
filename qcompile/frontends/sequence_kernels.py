"""Convolutions and recurrences over a text as whole operators, while a model is traced.

transformers writes them as functions that published kernels may take the place of (causal-conv1d,
flash-linear-attention, mamba-ssm), with the arguments of those kernels. What it falls back on
without them is cut into chunks by a loop whose length depends on the text, which no trace can
follow. In a trace, ours take their place: one operator each, for a text of any length, that begins
with the state that the cache holds.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import qcompile.ir.dialect  # noqa: F401  (registers the operators)


class LastState:
    """The recurrent state that a layer last asked its cache for.

    Mamba's kernel is not told the state: models read it, and use it for single tokens only.
    """

    def __init__(self) -> None:
        self._state: Tensor | None = None
        self._parts = 0

    def watch(self, cache: Any) -> None:
        """Notes every recurrent state that is read from a cache from now on."""
        read = getattr(cache, "get_recurrent_state", None)
        if read is None:
            return

        def noting(*args: Any, **kwargs: Any) -> Any:
            self._state, self._parts = read(*args, **kwargs), 0
            return self._state

        cache.get_recurrent_state = noting

    def take(self) -> Tensor | None:
        """The state ``[B, C, N]`` for the next scan; a layer of several heads scans each."""
        if self._state is None or self._state.dim() == 3:
            return self._state
        self._parts += 1
        return self._state[:, self._parts - 1]


@contextlib.contextmanager
def whole_sequences(model: nn.Module, states: LastState) -> Iterator[None]:
    """While inside, the functions that a model's modules call are ours.

    Args:
        model: The model.
        states: Knows the state that a scan begins with.
    """
    ours = {**_KERNELS, "mamba_selective_scan": _selective_scan(states)}
    replaced = []
    for name in {type(module).__module__ for module in model.modules()}:
        namespace = vars(sys.modules[name])
        for function in ours.keys() & namespace.keys():
            replaced.append((namespace, function, namespace[function]))
            namespace[function] = ours[function]
    try:
        yield
    finally:
        for namespace, function, original in replaced:
            namespace[function] = original


def _causal_conv(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> Tensor:
    """``[B, C, S]``, as causal-conv1d's ``causal_conv1d_fn``."""
    from transformers.activations import ACT2FN

    convolved: Tensor = torch.ops.qc.causal_conv(hidden_states, weight, bias)
    return convolved if activation is None else ACT2FN[activation](convolved)


def _delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """``[B, S, H, ...]``, as flash-linear-attention's gated delta rules; `g` may be of each row."""
    if use_qk_l2norm_in_kernel:
        query, key = (_normalized(x) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    log_decay = g if g.dim() == 4 else g.unsqueeze(-1)
    state = _state(initial_state, value, key.shape[-1])
    out, state = torch.ops.qc.linear_recurrence(query, key, value, log_decay, beta, state)
    return out, state


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 0,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """``[B, S, H, P]``, as mamba-ssm's ``mamba_chunk_scan_combined``; states ``[B, H, P, N]``."""
    del chunk_size
    step = _step(dt, dt_bias, dt_softplus)
    if dt_limit != (0.0, float("inf")):
        step = step.clamp(*dt_limit)
    given = None if initial_states is None else initial_states.transpose(-1, -2)
    out, state = torch.ops.qc.linear_recurrence(
        C,
        B,
        hidden_states * step.unsqueeze(-1),
        (A * step).unsqueeze(-1),
        None,
        _state(given, hidden_states, B.shape[-1]),
    )
    if D is not None:
        out = out + D.unsqueeze(-1) * hidden_states
    return (out, state.transpose(-1, -2)) if return_final_states else out


def _selective_scan(states: LastState) -> Callable[..., Any]:
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **_: Any,
    ) -> Any:
        """``[B, C, S]``, as mamba-ssm's ``selective_scan_fn``; states ``[B, C, N]``.

        Each channel is a head of its own, whose matrix has one column.
        """
        x = hidden_states.transpose(1, 2).unsqueeze(-1)
        step = _step(dt.transpose(1, 2), delta_bias, delta_softplus).unsqueeze(-1)
        query, key = (matrix.transpose(1, 2).unsqueeze(2) for matrix in (C, B))
        given = states.take()
        out, state = torch.ops.qc.linear_recurrence(
            query,
            key,
            x * step,
            A * step,
            None,
            _state(None if given is None else given.unsqueeze(-1), x, A.shape[-1]),
        )
        out, state = out.squeeze(-1).transpose(1, 2), state.squeeze(-1)
        if D is not None:
            out = out + hidden_states * D.unsqueeze(-1)
        if z is not None:
            out = out * functional.silu(z)
        return (out, state) if return_last_state else out

    return scan


def _step(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """How far each position moves the state."""
    step = dt if bias is None else dt + bias
    return functional.softplus(step) if softplus else step


def _state(given: Tensor | None, value: Tensor, rows: int) -> Tensor:
    """The matrices to begin with, ``[B, H, K, V]``: zeros where none are given."""
    batch, _, heads, columns = value.shape
    return value.new_zeros(batch, heads, rows, columns) if given is None else given


_KERNELS: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": _causal_conv,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _chunk_scan,
}
"""What transformers calls the functions, whatever the model. The scan of Mamba is added."""
