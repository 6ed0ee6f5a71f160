"""Routed experts in standard operators: all of them, each weighted by what the router says.

Standard ONNX has no product of matrices chosen by the data, and toolchains for fixed hardware take
no shapes that depend on it. So every expert computes for every token, side by side in two large
products; those that a token was not routed to get the weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import activate
from qcompile.backends.onnx.values import UnsupportedError, static_shape
from qcompile.ir.weights import TensorSpec


@dataclass(frozen=True)
class Gate:
    """What stands between the matrices of an expert; see `qc::experts`."""

    kind: str
    gated: bool
    limit: float
    offset: float


COLUMNS, ROWS = (2, 0, 1), (0, 2, 1)
"""The axes of ``[E, N, K]`` as ``[K, E N]`` and as ``[E K, N]`` have them."""


def mixture(
    b: Builder,
    x: ir.Value,
    index: ir.Value,
    weight: ir.Value,
    up: ir.Value,
    up_bias: ir.Value | None,
    down: ir.Value,
    down_bias: ir.Value | None,
    sizes: tuple[int, int],
    gate: Gate,
) -> ir.Value:
    """All experts side by side, each weighted by what the router says.

    Args:
        b: Where nodes go.
        x: ``[T, D]``.
        index: ``[T, k]``.
        weight: ``[T, k]``.
        up: ``[D, E F]``: the matrices side by side.
        up_bias: ``[E, F]`` or None.
        down: ``[E F, D]``, or gated ``[E F / 2, D]``: the matrices one below the other.
        down_bias: ``[E, D]`` or None.
        sizes: ``E`` and ``F``.
        gate: What stands between.
    """
    count, width = sizes
    hidden = _hidden(b, x, up, up_bias, sizes, gate)
    routed = _routing(b, index, weight, count)
    hidden = b.op("Mul", hidden, b.op("Unsqueeze", routed, [-1]))
    hidden = b.op("Reshape", hidden, [-1, count * (width // 2 if gate.gated else width)])
    made = b.op("MatMul", hidden, down)
    return made if down_bias is None else b.op("Add", made, b.op("MatMul", routed, down_bias))


def chosen_hidden(
    b: Builder,
    x: ir.Value,
    index: ir.Value,
    up: ir.Value,
    up_bias: ir.Value | None,
    sizes: tuple[int, int],
    gate: Gate,
) -> ir.Value:
    """The first half of `mixture`, of the chosen experts alone: ``[T, k, F]``, gated ``F / 2``.

    0 stands for a choice that names no expert.
    """
    hidden = _hidden(b, x, up, up_bias, sizes, gate)
    return b.op("MatMul", _choices(b, index, sizes[0], b.dtype), hidden)


def weighted_output(
    b: Builder,
    hidden: ir.Value,
    index: ir.Value,
    weight: ir.Value,
    down: ir.Value,
    down_bias: ir.Value | None,
    sizes: tuple[int, int],
) -> ir.Value:
    """The second half of `mixture`.

    Args:
        b: Where nodes go.
        hidden: ``[T, k, F]``, of the chosen experts.
        index: ``[T, k]``.
        weight: ``[T, k]``.
        down: ``[E F, D]``.
        down_bias: ``[E, D]`` or None.
        sizes: ``E`` and ``F``.
    """
    count, width = sizes
    choices = _choices(b, index, count, b.dtype)
    shares = b.op("Mul", choices, b.op("Unsqueeze", weight, [-1]))
    spread = b.op("MatMul", b.op("Transpose", shares, perm=[0, 2, 1]), hidden)
    made = b.op("MatMul", b.op("Reshape", spread, [-1, count * width]), down)
    if down_bias is None:
        return made
    routed = b.op("ReduceSum", shares, [1], keepdims=0)
    return b.op("Add", made, b.op("MatMul", routed, down_bias))


def side_by_side(b: Builder, weight: ir.Value, order: tuple[int, int, int]) -> ir.Value:
    """Experts' float matrices as one to multiply with from the left.

    Args:
        b: Where nodes go.
        weight: ``[E, N, K]``.
        order: `COLUMNS` for ``[K, E N]``, `ROWS` for ``[E K, N]``.
    """
    stacked = stack_shape(b, weight)
    first, second, last = (stacked[axis] for axis in order)
    shape = (first, second * last) if order == COLUMNS else (first * second, last)
    name = b.weight_name(weight)
    if name is None:
        return b.op("Reshape", b.op("Transpose", weight, perm=order), list(shape))

    def arrange(stored: Tensor) -> Tensor:
        return stored.permute(order).reshape(shape)

    spec = TensorSpec(shape, b.weights[str(weight.name)].spec.dtype)
    return b.arranged_weight(name, "columns" if order == COLUMNS else "rows", spec, arrange)


def stack_shape(b: Builder, weight: ir.Value) -> tuple[int, int, int]:
    """The shape of stacked matrices, ``(E, N, K)``."""
    shape = static_shape(b.shape(weight))
    if shape is None or len(shape) != len(COLUMNS):
        raise UnsupportedError("experts whose number varies")
    experts, rows, columns = shape
    return experts, rows, columns


def _hidden(
    b: Builder,
    x: ir.Value,
    up: ir.Value,
    up_bias: ir.Value | None,
    sizes: tuple[int, int],
    gate: Gate,
) -> ir.Value:
    """What the second matrices of all experts read, ``[T, E, F]`` or, gated, ``[T, E, F / 2]``."""
    hidden = b.op("Reshape", b.op("MatMul", x, up), [-1, *sizes])
    if up_bias is not None:
        hidden = b.op("Add", hidden, up_bias)
    return _middle(b, hidden, gate)


def _choices(b: Builder, index: ir.Value, count: int, dtype: ir.DataType) -> ir.Value:
    """1 where a choice names an expert and 0 elsewhere, ``[T, k, E]``."""
    experts = b.constant(range(count), ir.DataType.INT64)
    return b.cast(b.op("Equal", b.op("Unsqueeze", index, [-1]), experts), dtype)


def _middle(b: Builder, hidden: ir.Value, gate: Gate) -> ir.Value:
    """What stands between the products, on ``[T, E, F]`` or, gated, ``[T, E, 2 F]``."""
    if not gate.gated:
        return activate(b, hidden, gate.kind)
    first, other = b.ops("Split", hidden, outputs=2, axis=2, num_outputs=2)
    if gate.limit > 0:
        first = b.op("Clip", first, None, gate.limit)
        other = b.op("Clip", other, -gate.limit, gate.limit)
    shifted = b.op("Add", other, gate.offset) if gate.offset else other
    return b.op("Mul", activate(b, first, gate.kind), shifted)


def _routing(b: Builder, index: ir.Value, weight: ir.Value, count: int) -> ir.Value:
    """The weight of each expert for each token, ``[T, E]``, from ``[T, k]`` of the chosen ones."""
    experts = b.constant(range(count), ir.DataType.INT64)
    chosen = b.op("Equal", b.op("Unsqueeze", index, [-1]), experts)
    zero = b.constant(0.0, weight.dtype or b.dtype)
    shares = b.op("Where", chosen, b.op("Unsqueeze", weight, [-1]), zero)
    return b.op("ReduceSum", shares, [1], keepdims=0)
