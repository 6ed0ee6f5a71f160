"""Convolutions and recurrences along a text in standard operators.

A recurrence is a `Scan`, whose body is one position: what does not depend on the position before
stands outside of it, computed for all positions at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import Axis, UnsupportedError, static_size

RECURRENCE = Table()

_POSITIONS = 1
"""The axis of the text."""


@RECURRENCE.register(torch.ops.qc.causal_conv.default)
def _causal_conv(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    channels, width = (_number(size) for size in b.shape(weight))
    kernel = b.op("Unsqueeze", weight, [1])
    pads = [width - 1, 0]
    return b.op("Conv", x, kernel, bias, pads=pads, group=channels, kernel_shape=[width])


@RECURRENCE.register(torch.ops.qc.linear_recurrence.default)
def _linear_recurrence(
    b: Builder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    log_decay: ir.Value,
    rate: ir.Value | None,
    state: ir.Value,
) -> Sequence[ir.Value]:
    """Heads as ``[groups, heads of a group]``, so that groups broadcast, matrices behind them."""
    batch, length, groups, rows = b.shape(key)
    heads, columns = (_number(size) for size in b.shape(value)[2:])
    rows, groups = _number(rows), _number(groups)
    shared, own = (batch, length, groups, 1), (batch, length, groups, heads // groups)
    decayed_rows = _number(b.shape(log_decay)[-1])
    scanned = [
        b.reshape(query, (*shared, 1, rows)),
        b.reshape(key, (*shared, rows, 1)),
        b.reshape(value, (*own, 1, columns)),
        b.op("Exp", b.reshape(log_decay, (*own, decayed_rows, 1))),
    ]
    if rate is not None:
        scanned += [b.reshape(key, (*shared, 1, rows)), b.reshape(rate, (*own, 1, 1))]
    matrices = (batch, groups, heads // groups, rows, columns)
    last, out = b.ops(
        "Scan",
        b.reshape(state, matrices),
        *scanned,
        outputs=2,
        dtypes=[state.dtype, value.dtype],
        body=_position(state.dtype, len(scanned), b.opset),
        num_scan_inputs=len(scanned),
        scan_input_axes=[_POSITIONS] * len(scanned),
        scan_output_axes=[_POSITIONS],
    )
    whole, final = b.results
    return _shaped(b, out, whole.shape), _shaped(b, last, final.shape)


def _position(dtype: ir.DataType | None, scanned: int, opset: int) -> ir.Graph:
    """The body: a state and one position of all that is scanned, to the next state and its row."""
    names = ("query", "key", "value", "decay", "key_row", "rate")[:scanned]
    state, *inputs = (
        ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype))
        for name in ("state", *names)
    )
    given = dict(zip(names, inputs, strict=True))
    nodes: list[ir.Node] = []

    def op(op_type: str, *operands: ir.Value) -> ir.Value:
        node = ir.Node("", op_type, operands)
        nodes.append(node)
        node.outputs[0].name = f"{op_type.lower()}_{len(nodes)}"
        node.outputs[0].type = state.type
        return node.outputs[0]

    decayed = op("Mul", state, given["decay"])
    new = given["value"]
    if "rate" in given:
        new = op("Mul", given["rate"], op("Sub", new, op("MatMul", given["key_row"], decayed)))
    following = op("Add", decayed, op("Mul", given["key"], new))
    row = op("MatMul", given["query"], following)
    return ir.Graph(
        [state, *inputs],
        [following, row],
        nodes=nodes,
        opset_imports={"": opset},
        name="position",
    )


def _shaped(b: Builder, x: ir.Value, shape: Sequence[Axis]) -> ir.Value:
    return b.op("Reshape", x, b.shape_tensor(b.sizes(shape)))


def _number(size: Axis) -> int:
    number = static_size(size)
    if number is None:
        raise UnsupportedError("a number of heads or channels that varies")
    return number
