"""Products of matrices, and attention, which is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch

from qcompile.backends.onnx.aten_logic import is_nan
from qcompile.backends.onnx.aten_shape import swap_axes
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import computing_dtype

aten = torch.ops.aten

LINEAR = Table()

_BOOL = ir.DataType.BOOL


@LINEAR.register(aten.linear.default)
def linear(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    """``x W^T + bias``.

    A stored weight is stored transposed, as ``[K, N]``: run times multiply by that fastest. One
    that is needed as it is (a tied embedding table) goes through `Gemm`, which transposes on the
    fly but takes matrices only.
    """
    turned = b.transposed_weight(weight)
    if turned is None and b.weight_name(weight) is None:
        turned = swap_axes(b, weight, 0, 1)
    if turned is not None:
        product = b.op("MatMul", x, turned)
        return product if bias is None else b.op("Add", product, bias)
    rows = x if b.rank(x) == 2 else b.op("Reshape", x, [-1, b.shape(weight)[1]])  # type: ignore[list-item]
    product = b.op("Gemm", rows, weight, bias, transB=1)
    if b.rank(x) == 2:
        return product
    sizes = [*b.sizes(b.shape(x)[:-1]), b.size(b.shape(weight)[0])]
    return b.op("Reshape", product, sizes)


def _product(b: Builder, x: ir.Value, y: ir.Value) -> ir.Value:
    wide = computing_dtype(b.dtype)
    return b.cast(b.op("MatMul", b.cast(x, wide), b.cast(y, wide)), b.dtype)


LINEAR.update(
    dict.fromkeys(
        (
            aten.matmul.default,
            aten.mm.default,
            aten.bmm.default,
            aten.mv.default,
            aten.dot.default,
            aten.vdot.default,
        ),
        _product,
    )
)


@LINEAR.register(aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten.addbmm.default)
def _add_product(
    b: Builder,
    bias: ir.Value,
    x: ir.Value,
    y: ir.Value,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> ir.Value:
    product = _product(b, x, y)
    if b.node.target is aten.addbmm.default:
        product = b.op("ReduceSum", product, [0], keepdims=0)
    if alpha != 1:
        product = b.op("Mul", product, alpha)
    if beta == 0:
        return product
    return b.op("Add", product, bias if beta == 1 else b.op("Mul", bias, beta))


@LINEAR.register(aten.outer.default, aten.ger.default)
def _outer(b: Builder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.op("Mul", b.op("Unsqueeze", x, [1]), b.op("Unsqueeze", y, [0]))


@LINEAR.register(aten.einsum.default)
def _einsum(b: Builder, equation: str, operands: Sequence[ir.Value], path: Any = None) -> ir.Value:
    del path
    return b.op("Einsum", *operands, equation=equation.replace(" ", ""))


@LINEAR.register(aten.scaled_dot_product_attention.default)
def _scaled_dot_product_attention(
    b: Builder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    del dropout_p  # programs are captured in evaluation mode
    lengths = [b.axis_size(x, b.rank(x) - 2) for x in (query, key)]
    if enable_gqa:
        key, value = (share_heads(b, x, b.shape(query)[-3]) for x in (key, value))
    allowed = additive = None
    if attn_mask is not None:
        allowed, additive = (attn_mask, None) if attn_mask.dtype == _BOOL else (None, attn_mask)
    if is_causal:
        triangle = b.op("Expand", b.constant(True, _BOOL), lengths)
        causal = b.op("Trilu", triangle, upper=0)
        allowed = causal if allowed is None else b.op("And", allowed, causal)
    size = int(b.shape(query)[-1])
    factor = size**-0.5 if scale is None else scale
    turned = swap_axes_of(b, key, b.rank(query))
    scores = b.op("MatMul", b.op("Mul", query, factor), turned)
    if additive is not None:
        scores = b.op("Add", scores, b.cast(additive, b.dtype))
    weights = masked_softmax(b, scores, allowed, guard=False)
    return b.op("MatMul", weights, value)


def swap_axes_of(b: Builder, x: ir.Value, rank: int) -> ir.Value:
    """A tensor of a rank with its last two axes exchanged."""
    return b.op("Transpose", x, perm=[*range(rank - 2), rank - 1, rank - 2])


def share_heads(b: Builder, x: ir.Value, heads: int | torch.SymInt) -> ir.Value:
    """Repeats each of the heads, the third axis from the end, until there are ``heads``.

    Args:
        b: Where nodes go.
        x: ``[..., H, T, D]`` with a known number of heads.
        heads: A multiple of ``H``.
    """
    shape = list(b.shape(x))
    rank = len(shape)
    groups = int(heads) // int(shape[-3])
    if groups == 1:
        return x
    axis = rank - 2
    counts = [1] * (rank + 1)
    counts[axis] = groups
    spread = b.op("Expand", b.op("Unsqueeze", x, [axis]), counts)
    sizes = [*b.sizes(shape[:-3]), int(heads), *b.sizes(shape[-2:])]
    return b.op("Reshape", spread, sizes, allowzero=1)


def masked_softmax(
    b: Builder, scores: ir.Value, allowed: ir.Value | None, *, guard: bool
) -> ir.Value:
    """Softmax over the last axis with weight 0 where nothing is allowed.

    Args:
        b: Where nodes go.
        scores: ``[..., T]``.
        allowed: Boolean, broadcastable to the scores; or None.
        guard: Whether rows may be -inf throughout for another reason than `allowed`.
    """
    if allowed is None:
        weights = b.op("Softmax", scores, axis=-1)
        zero = b.constant(0.0, scores.dtype or b.dtype)
        return b.op("Where", is_nan(b, weights), zero, weights) if guard else weights
    dtype = scores.dtype or b.dtype
    masked = b.op("Where", allowed, scores, b.constant(float("-inf"), dtype))
    # Rows where nothing is allowed are not numbers here; the second choice makes them 0.
    weights = b.op("Softmax", masked, axis=-1)
    chosen = b.op("Where", allowed, weights, b.constant(0.0, dtype))
    if not guard:
        return chosen
    return b.op("Where", is_nan(b, chosen), b.constant(0.0, dtype), chosen)
