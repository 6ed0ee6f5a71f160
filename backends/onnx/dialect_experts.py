"""Routed experts in standard operators; those of quantized ones stand side by side as codes.

``experts(x, ..., dequantize(up), dequantize(down))``  =>  the two products of `mixture`,
each with a `DequantizeLinear` (or a look-up) that run times fuse with it. Where the last group of
an expert's inputs is short, the groups of the second matrices do not follow one another: those
are decoded side by side, and then turned.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.mixture import (
    COLUMNS,
    ROWS,
    Gate,
    chosen_hidden,
    mixture,
    side_by_side,
    stack_shape,
    weighted_output,
)
from qcompile.backends.onnx.stored import Placement, StoredCodes, decoded_codes
from qcompile.backends.onnx.stored_levels import decoded_matrix
from qcompile.backends.onnx.translation import Table
from qcompile.formats import IntegerFormat, IntegerScaleFormat, StoredWeight, stored_weight
from qcompile.ir import dialect
from qcompile.kernels.quantize.groups import group_count

EXPERTS = Table()


@EXPERTS.register(dialect.experts)
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
    stored_up, stored_down = stored_weight(b.node.args[3]), stored_weight(b.node.args[5])
    columns = side_by_side(b, up, COLUMNS) if stored_up is None else _columns(b, stored_up)
    rows = side_by_side(b, down, ROWS) if stored_down is None else _rows(b, stored_down)
    gate = Gate(kind, gated, limit, offset)
    sizes = stack_shape(b, up)[:2]
    return mixture(b, x, index, weight, columns, up_bias, rows, down_bias, sizes, gate)


@EXPERTS.register(dialect.expert_hidden)
def _expert_hidden(
    b: Builder,
    x: ir.Value,
    index: ir.Value,
    up: ir.Value,
    up_bias: ir.Value | None,
    kind: str,
    gated: bool,
    limit: float,
    offset: float,
) -> ir.Value:
    stored = stored_weight(b.node.args[2])
    columns = side_by_side(b, up, COLUMNS) if stored is None else _columns(b, stored)
    gate = Gate(kind, gated, limit, offset)
    return chosen_hidden(b, x, index, columns, up_bias, stack_shape(b, up)[:2], gate)


@EXPERTS.register(dialect.expert_output)
def _expert_output(
    b: Builder,
    hidden: ir.Value,
    index: ir.Value,
    weight: ir.Value,
    down: ir.Value,
    down_bias: ir.Value | None,
) -> ir.Value:
    stored = stored_weight(b.node.args[3])
    rows = side_by_side(b, down, ROWS) if stored is None else _rows(b, stored)
    count, _, width = stack_shape(b, down)
    return weighted_output(b, hidden, index, weight, rows, down_bias, (count, width))


def _columns(b: Builder, weight: StoredWeight) -> ir.Value:
    """``[E, N, K]`` as ``[K, E N]``, decoded at run time."""
    experts, n, k = weight.shape
    size = weight.format.group_size
    groups = group_count(k, size)
    placement = Placement(COLUMNS, (experts * n, k), size if size < k else 0, groups)
    return _decoded(b, weight, placement)


def _rows(b: Builder, weight: StoredWeight) -> ir.Value:
    """``[E, N, K]`` as ``[E K, N]``, decoded at run time."""
    experts, n, k = weight.shape
    size = weight.format.group_size
    if 0 < size < k and k % size:
        decoded = b.op("Reshape", _columns(b, weight), [k, experts, n])
        return b.op("Reshape", b.op("Transpose", decoded, perm=[1, 0, 2]), [experts * k, n])
    groups = group_count(k, size)
    return _decoded(b, weight, Placement(ROWS, (n, experts * k), k // groups, experts * groups))


def _decoded(b: Builder, weight: StoredWeight, placement: Placement) -> ir.Value:
    if isinstance(weight.format, IntegerFormat | IntegerScaleFormat):
        return decoded_codes(b, StoredCodes.of(weight, placement))
    return decoded_matrix(b, weight, placement)
