"""The `qc::` operators: every one is its reference function and one line here.

`define` registers a function from ``kernels/<op>/reference.py`` as ``torch.ops.qc.<name>``. The
schema comes from its annotations, the shape rule from running it on fake tensors (or from `shape`,
where that would be slow), and the derivative from differentiating it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import infer_schema
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from qcompile.kernels.add_sparse.reference import add_sparse as _add_sparse
from qcompile.kernels.attention.reference import attention as _attention
from qcompile.kernels.causal_conv.reference import causal_conv as _causal_conv
from qcompile.kernels.dequantize.reference import dequantize as _dequantize
from qcompile.kernels.experts.reference import expert_hidden as _expert_hidden
from qcompile.kernels.experts.reference import expert_output as _expert_output
from qcompile.kernels.experts.reference import experts as _experts
from qcompile.kernels.gated_act.reference import ACTIVATIONS as ACTIVATIONS
from qcompile.kernels.gated_act.reference import act as _act
from qcompile.kernels.gated_act.reference import gated_act as _gated_act
from qcompile.kernels.kv_append.reference import kv_append as _kv_append
from qcompile.kernels.kv_append.reference import kv_decode as _kv_decode
from qcompile.kernels.kv_append.reference import kv_encode as _kv_encode
from qcompile.kernels.kv_append.rows import row_bytes
from qcompile.kernels.layer_norm.reference import layer_norm as _layer_norm
from qcompile.kernels.linear_recurrence.reference import linear_recurrence as _linear_recurrence
from qcompile.kernels.lookup.reference import lookup as _lookup
from qcompile.kernels.lookup_vectors.codebooks import codebook as _codebook
from qcompile.kernels.lookup_vectors.reference import lookup_vectors as _lookup_vectors
from qcompile.kernels.quantize.groups import group_count
from qcompile.kernels.quantize.reference import dynamic_scale as _dynamic_scale
from qcompile.kernels.quantize.reference import quantize as _quantize
from qcompile.kernels.quantize_float.reference import float_scale as _float_scale
from qcompile.kernels.quantize_float.reference import quantize_float as _quantize_float
from qcompile.kernels.rms_norm.reference import rms_norm as _rms_norm
from qcompile.kernels.rope.reference import rope as _rope
from qcompile.kernels.transform.reference import transform as _transform

NAMESPACE = "qc"

_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(
    reference: Callable[..., Any],
    *,
    name: str | None = None,
    shape: Callable[..., Any] | None = None,
    differentiable: bool = True,
) -> torch._ops.OpOverload:
    """Registers an operator of the dialect.

    Args:
        reference: The oracle: tensors and plain values in, new tensors out, mostly one; annotated,
            without branches on sizes, and differentiable by autograd where it is differentiable at
            all.
        name: The operator's name; the function's own unless given.
        shape: A cheaper function with the same signature that returns an empty result.
        differentiable: Whether to derive a backward.

    Returns:
        The overload ``torch.ops.qc.<name>.default``.
    """
    name = name or reference.__name__
    qualified = f"{NAMESPACE}::{name}"
    _library.define(name + infer_schema(reference, mutates_args=()))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, shape or reference, lib=_library)
    overload: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    if differentiable:
        _register_derivative(qualified, reference)
    return overload


def is_dialect_op(target: object) -> bool:
    """Whether a call target is an operator of this dialect."""
    return isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE


def _register_derivative(qualified: str, reference: Callable[..., Any]) -> None:
    """The backward of an operator re-runs its reference under autograd."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        flat, ctx.tree = tree_flatten(list(inputs))
        ctx.tensor_positions = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        ctx.plain = [None if isinstance(value, Tensor) else value for value in flat]
        ctx.wanted = [i for i in ctx.tensor_positions if flat[i].requires_grad]
        ctx.save_for_backward(*(flat[i] for i in ctx.tensor_positions))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        flat = list(ctx.plain)
        for position, saved in zip(ctx.tensor_positions, ctx.saved_tensors, strict=True):
            flat[position] = saved.detach().requires_grad_(saved.is_floating_point())
        arguments = tree_unflatten(flat, ctx.tree)
        with torch.enable_grad():
            outputs = tree_leaves(reference(*arguments))
        gradients: list[Tensor | None] = [None] * len(flat)
        reached = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if output.requires_grad and grad is not None
        ]
        if reached:
            found = torch.autograd.grad(
                [output for output, _ in reached],
                [flat[i] for i in ctx.wanted],
                [grad for _, grad in reached],
                allow_unused=True,
            )
            for position, gradient in zip(ctx.wanted, found, strict=True):
                gradients[position] = gradient
        parts = tree_unflatten(gradients, ctx.tree)
        return tuple(_gradients_of(*both) for both in zip(parts, arguments, strict=True))

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)


def _gradients_of(part: Any, argument: Any) -> Any:
    """Those of one argument: a list has one per tensor, unless it is a list of plain values."""
    if not isinstance(argument, list):
        return part
    return part if all(isinstance(value, Tensor) for value in argument) else None


def _attention_shape(
    query: Tensor, key: Tensor, value: Tensor, *rest: object, **named: object
) -> Tensor:
    del key, rest, named
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _like_first(x: Tensor, *rest: object, **named: object) -> Tensor:
    del rest, named
    return torch.empty_like(x)


def _expert_hidden_shape(
    x: Tensor,
    index: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    kind: str,
    gated: bool,
    *rest: object,
) -> Tensor:
    del up_bias, kind, rest
    return x.new_empty((*index.shape, up.shape[1] // 2 if gated else up.shape[1]))


def _expert_output_shape(
    hidden: Tensor, index: Tensor, weight: Tensor, down: Tensor, down_bias: Tensor | None
) -> Tensor:
    del weight, down_bias
    return hidden.new_empty((index.shape[0], down.shape[1]))


def _recurrence_shape(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, rate: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    del query, key, log_decay, rate
    return torch.empty_like(value), torch.empty_like(state)


def _append_shape(past: Tensor, new: Tensor, format: str = "float", group_size: int = 0) -> Tensor:
    del format, group_size
    batch, heads, length, width = past.shape
    return past.new_empty((batch, heads, length + new.shape[2], width))


def _rows_shape(x: Tensor, format: str, group_size: int) -> Tensor:
    width = row_bytes(x.shape[-1], format, group_size)
    return torch.empty((*x.shape[:-1], width), dtype=torch.uint8, device=x.device)


def _row_values_shape(rows: Tensor, format: str, group_size: int, width: int) -> Tensor:
    del format, group_size
    return torch.empty((*rows.shape[:-1], width), dtype=torch.float32, device=rows.device)


def _scale_shape(x: Tensor, codes: int | str, group_size: int) -> Tensor:
    del codes
    groups = group_count(x.shape[-1], group_size)
    return torch.empty((*x.shape[:-1], groups), dtype=_wide(x), device=x.device)


def _codes_shape(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int
) -> Tensor:
    del scale, bits, group_size
    return torch.empty_like(x, dtype=torch.int8 if zero_point is None else torch.uint8)


def _float_codes_shape(x: Tensor, scale: Tensor, levels: str, group_size: int) -> Tensor:
    del scale, levels, group_size
    return torch.empty_like(x, dtype=torch.uint8)


def _values_shape(codes: Tensor, scale: Tensor, *rest: object) -> Tensor:
    del rest
    return torch.empty_like(codes, dtype=_wide(scale))


def _looked_up_shape(codes: Tensor, scale: Tensor | None, *rest: object) -> Tensor:
    del rest
    return torch.empty_like(codes, dtype=torch.float32 if scale is None else _wide(scale))


def _vectors_shape(codes: Tensor, scale: Tensor, codebook: str, *rest: object) -> Tensor:
    del rest
    size = codes.shape[-1] * len(_codebook(codebook)[0])
    return torch.empty((*codes.shape[:-1], size), dtype=_wide(scale), device=codes.device)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


rms_norm = define(_rms_norm, shape=_like_first)
layer_norm = define(_layer_norm, shape=_like_first)
rope = define(_rope, shape=_like_first)
attention = define(_attention, shape=_attention_shape)
act = define(_act, shape=_like_first)
gated_act = define(_gated_act, shape=_like_first)
experts = define(_experts, shape=_like_first)
expert_hidden = define(_expert_hidden, shape=_expert_hidden_shape)
expert_output = define(_expert_output, shape=_expert_output_shape)
causal_conv = define(_causal_conv, shape=_like_first)
linear_recurrence = define(_linear_recurrence, shape=_recurrence_shape)
kv_append = define(_kv_append, shape=_append_shape)
kv_encode = define(_kv_encode, shape=_rows_shape)
kv_decode = define(_kv_decode, shape=_row_values_shape)
dynamic_scale = define(_dynamic_scale, shape=_scale_shape)
quantize = define(_quantize, shape=_codes_shape)
dequantize = define(_dequantize, shape=_values_shape)
float_scale = define(_float_scale, shape=_scale_shape)
quantize_float = define(_quantize_float, shape=_float_codes_shape)
lookup = define(_lookup, shape=_looked_up_shape)
lookup_vectors = define(_lookup_vectors, shape=_vectors_shape)
add_sparse = define(_add_sparse, shape=_like_first)
transform = define(_transform, shape=_like_first)
