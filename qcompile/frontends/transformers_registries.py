"""What a trace may ask of transformers: attention, its masks and routed experts as one operator.

transformers keeps public registries of implementations for these three. While a model is traced,
ours are registered, so that they arrive whole instead of decomposed. A model that does not use a
registry is traced as it is, and recognized later, on ATen.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import qcompile.ir.dialect  # noqa: F401  (registers the operators that the trace calls)
from qcompile.frontends.experts import experts_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NAME = "qcompile"
"""The name under which our implementations are registered."""


_RESTATED = frozenset({"position_ids", "cache_position"}) | {
    f"{what}_{side}" for what in ("cu_seq_lens", "max_length") for side in "qk"
}
"""Tensors that attention may be given and that say nothing beyond the mask."""


def asks_for_attention(model: PreTrainedModel) -> bool:
    """Whether transformers lets another attention be put into the model."""
    can_set = getattr(type(model), "_can_set_attn_implementation", None)
    return can_set is None or bool(can_set())


@contextlib.contextmanager
def whole_operators(model: PreTrainedModel) -> Iterator[None]:
    """While inside, attention and experts are single operators where the model lets them be."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_of(model))
    with _implementations(model, attention=NAME, experts=NAME):
        yield


@contextlib.contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """While inside, attention is traced as the model itself writes it down."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_of(model))
    with _implementations(model, attention=None, experts=NAME):
        yield


@contextlib.contextmanager
def _implementations(
    model: PreTrainedModel, *, attention: str | None, experts: str
) -> Iterator[None]:
    wanted = {"_experts_implementation": experts}
    if attention is not None:
        wanted["_attn_implementation"] = attention
    before = [
        (config, setting, getattr(config, setting))
        for config in _configs(model.config)
        for setting in wanted
        if hasattr(config, setting)
    ]
    for config, setting, _ in before:
        setattr(config, setting, wanted[setting])
    try:
        yield
    finally:
        for config, setting, value in before:
            setattr(config, setting, value)


@contextlib.contextmanager
def functional_rotary_scaling(model: PreTrainedModel) -> Iterator[None]:
    """Rotary frequencies that grow with the sequence are a function of the positions inside.

    transformers recomputes them in place once a batch grows past the trained length, which no
    trace can follow; the formula itself takes the length as a tensor.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    replaced = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if not isinstance(kind, str) or "dynamic" not in kind:
            continue
        plain = inspect.unwrap(type(module).forward)  # without the update that decorates it
        module.forward = _growing_rotary(module, plain, ROPE_INIT_FUNCTIONS[kind])
        replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _growing_rotary(module: nn.Module, plain: Any, frequencies: Any) -> Any:
    def forward(x: Tensor, position_ids: Tensor, **rest: Any) -> Any:
        length = position_ids.max() + 1
        inverse, module.attention_scaling = frequencies(module.config, x.device, seq_len=length)
        kept = module._buffers["inv_freq"]
        module._buffers["inv_freq"] = inverse
        try:
            return plain(module, x, position_ids, **rest)
        finally:
            module._buffers["inv_freq"] = kept

    return forward


def _configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    nested = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    return [config] + [found for child in nested if child is not None for found in _configs(child)]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **rest: object,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls, as one operator.

    Raises:
        NotImplementedError: If it is given a tensor whose meaning is not known here.
    """
    del dropout
    for name, argument in rest.items():
        if isinstance(argument, Tensor) and name not in _RESTATED:
            raise NotImplementedError(f"attention with '{name}'")
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    output = torch.ops.qc.attention(
        query,
        key,
        value,
        attention_mask,
        None,
        s_aux,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        is_causal and attention_mask is None,
        0,
        float(softcap or 0.0),
    )
    return output.transpose(1, 2).contiguous(), None


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The boolean mask, always spelled out, so that it can be recognized by probing."""
    from transformers.masking_utils import sdpa_mask

    kwargs["allow_is_causal_skip"] = False
    kwargs["allow_is_bidirectional_skip"] = False
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask
