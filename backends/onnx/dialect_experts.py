"""Routed experts in standard operators: all of them, each weighted by what the router says.

Standard ONNX has no product of matrices chosen by the data, and toolchains for fixed hardware take
no shapes that depend on it. So every expert computes for every token, side by side in two large
products; those that a token was not routed to get the weight 0.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import activate
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError, static_shape
from qcompile.ir.weights import TensorSpec

EXPERTS = Table()


@EXPERTS.register(torch.ops.qc.experts.default)
def _experts(
    b: Builder,
    x: ir.Value,
    index: ir.Value,
    weight: ir.Value,
    up: ir.Value,
    up_bias: ir.Value | None,
    down: ir.Value,
    down_bias: ir.Value | None,
    kind: str,
    gated: bool,
    limit: float,
    offset: float,
) -> ir.Value:
    count, width, features = _matrices(b, up)
    hidden = b.op("MatMul", x, _side_by_side(b, up, "columns", (features, count * width)))
    hidden = b.op("Reshape", hidden, [-1, count, width])
    if up_bias is not None:
        hidden = b.op("Add", hidden, up_bias)
    hidden = _middle(b, hidden, kind, gated, limit, offset)
    routed = _routing(b, index, weight, count)
    hidden = b.op("Mul", hidden, b.op("Unsqueeze", routed, [-1]))
    inner = count * (width // 2 if gated else width)
    hidden = b.op("Reshape", hidden, [-1, inner])
    made = b.op("MatMul", hidden, _side_by_side(b, down, "rows", (inner, features)))
    return made if down_bias is None else b.op("Add", made, b.op("MatMul", routed, down_bias))


def _matrices(b: Builder, weight: ir.Value) -> tuple[int, int, int]:
    shape = static_shape(b.shape(weight))
    if shape is None or len(shape) != 3:
        raise UnsupportedError("experts whose number varies")
    return shape


def _side_by_side(b: Builder, weight: ir.Value, label: str, shape: tuple[int, int]) -> ir.Value:
    """``[E, N, K]`` as one matrix to multiply with from the left, ``[K, E N]`` or ``[E K, N]``."""
    order = (2, 0, 1) if label == "columns" else (0, 2, 1)
    name = b.weight_name(weight)
    if name is None:
        return b.op("Reshape", b.op("Transpose", weight, perm=order), list(shape))

    def arrange(stored: Tensor) -> Tensor:
        return stored.permute(order).reshape(shape)

    spec = TensorSpec(shape, b.weights[str(weight.name)].spec.dtype)
    return b.arranged_weight(name, label, spec, arrange)


def _middle(
    b: Builder, hidden: ir.Value, kind: str, gated: bool, limit: float, offset: float
) -> ir.Value:
    """What stands between the products, on ``[T, E, F]`` or, gated, ``[T, E, 2 F]``."""
    if not gated:
        return activate(b, hidden, kind)
    gate, other = b.ops("Split", hidden, outputs=2, axis=2, num_outputs=2)
    if limit > 0:
        gate, other = b.op("Clip", gate, None, limit), b.op("Clip", other, -limit, limit)
    shifted = b.op("Add", other, offset) if offset else other
    return b.op("Mul", activate(b, gate, kind), shifted)


def _routing(b: Builder, index: ir.Value, weight: ir.Value, count: int) -> ir.Value:
    """The weight of each expert for each token, ``[T, E]``, from ``[T, k]`` of the chosen ones."""
    experts = b.constant(range(count), ir.DataType.INT64)
    chosen = b.op("Equal", b.op("Unsqueeze", index, [-1]), experts)
    zero = b.constant(0.0, weight.dtype or b.dtype)
    shares = b.op("Where", chosen, b.op("Unsqueeze", weight, [-1]), zero)
    return b.op("ReduceSum", shares, [1], keepdims=0)
