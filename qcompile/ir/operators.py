"""Operators by name, and which of them a saved program may call.

Saved programs come from outside. They may call functional operators of ATen that compute tensors
from tensors, the dialect, and arithmetic on sizes; nothing that writes in place, reads files or
prints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qcompile.errors import ArtifactError
from qcompile.ir.dialect import NAMESPACE
from qcompile.ir.verify import PYTHON_OPERATORS

_BESIDES_CORE = """
    __and__ __or__ _safe_softmax _unsafe_view adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d addbmm addmv adjoint all argsort arange baddbmm
    batch_norm bincount broadcast_tensors broadcast_to chunk concat concatenate contiguous conv1d
    conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d count_nonzero detach dot
    dropout einsum empty_like expand_as expand_copy eye fill fix flatten floor_divide ger glu
    group_norm hardswish index_add index_copy index_fill instance_norm isin item layer_norm lift
    lift_fresh lift_fresh_copy linalg_vector_norm linear linspace log_sigmoid log_softmax logsumexp
    mT masked_fill masked_select matmul matrix_H max max_pool1d max_pool2d max_pool3d meshgrid min
    moveaxis movedim mv narrow new_empty new_empty_strided new_full new_ones new_zeros
    nonzero_numpy norm numpy_T one_hot ones ones_like outer pad pixel_shuffle pixel_unshuffle prelu
    ravel repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape
    reshape_as rms_norm roll rsub scaled_dot_product_attention scatter select_copy slice_copy
    softmax sort split split_with_sizes squeeze stack std std_mean sum swapaxes swapdims
    sym_constrain_range sym_constrain_range_for_size t take_along_dim tensor_split tile to topk
    transpose transpose_copy tril tril_indices triu triu_indices type_as unbind unflatten unfold
    unsafe_chunk unsafe_split unsafe_split_with_sizes upsample_bicubic2d upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
    var var_mean vdot view_as where zeros zeros_like
    _assert_async _assert_scalar _assert_tensor_metadata _prelu_kernel
    _upsample_nearest_exact1d _upsample_nearest_exact2d
"""
"""What models call beyond the operators that torch tags as core or pointwise."""

_ATEN = frozenset(_BESIDES_CORE.split())
_PYTHON: Mapping[str, Any] = {f"py.{operator.__name__}": operator for operator in PYTHON_OPERATORS}
_NAMESPACES = {"aten", NAMESPACE}
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def operator_name(target: Any) -> str | None:
    """An operator's full name, ``aten.add.Tensor``, or None if a saved program may not call it."""
    if isinstance(target, torch._ops.OpOverload):
        if not _is_allowed(target):
            return None
        packet = target._schema.name.partition("::")[2]
        return f"{target.namespace}.{packet}.{target._overloadname}"
    name = f"py.{getattr(target, '__name__', '')}"
    return name if _PYTHON.get(name) is target else None


def find_operator(name: str) -> Callable[..., Any]:
    """The operator of a name.

    Raises:
        ArtifactError: If there is none, or a saved program may not call it.
    """
    if name in _PYTHON:
        operator: Callable[..., Any] = _PYTHON[name]
        return operator
    parts = name.split(".")
    if len(parts) == 3 and parts[0] in _NAMESPACES and all(map(_IDENTIFIER.fullmatch, parts)):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None)
        if isinstance(overload, torch._ops.OpOverload) and _is_allowed(overload):
            return overload
    raise ArtifactError(
        f"the operator '{name}' is unknown, or no saved program may call it",
        remedy="upgrade qcompile, or compile the model again",
    )


def _is_allowed(overload: torch._ops.OpOverload) -> bool:
    if overload._schema.is_mutable or overload.namespace not in _NAMESPACES:
        return False
    packet = overload._schema.name.partition("::")[2]
    is_core = torch.Tag.core in overload.tags or torch.Tag.pointwise in overload.tags
    return overload.namespace == NAMESPACE or is_core or packet in _ATEN
