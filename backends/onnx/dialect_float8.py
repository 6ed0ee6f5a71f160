"""Activations in 8-bit floats: ONNX's own types, which `Cast` rounds to as the oracle does."""

from __future__ import annotations

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import covering_scale, spread_groups
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError, static_size
from qcompile.kernels.quantize_float8.reference import largest_float8

qc = torch.ops.qc

FLOAT8 = Table()

FLOAT8_TYPES = {"e4m3": ir.DataType.FLOAT8E4M3FN, "e5m2": ir.DataType.FLOAT8E5M2}
"""Tables of levels, and the types whose elements are their codes."""

_FLOAT = ir.DataType.FLOAT


@FLOAT8.register(qc.float8_scale.default)
def _float8_scale(b: Builder, x: ir.Value, levels: str, group_size: int) -> ir.Value:
    return covering_scale(b, x, largest_float8(levels), group_size)


@FLOAT8.register(qc.quantize_float8.default)
def _quantize_float8(
    b: Builder, x: ir.Value, scale: ir.Value, levels: str, group_size: int
) -> ir.Value:
    # Standard operators cannot look at the bits of a float: codes are elements, not bytes.
    if any(user.target is not qc.lookup.default for user in b.node.users):
        raise UnsupportedError("codes of 8-bit floats that are not only decoded")
    size, groups = (static_size(b.shape(value)[-1]) for value in (x, scale))
    if size is None or groups is None:
        raise UnsupportedError("a last axis whose size varies")
    ratio = b.op(
        "Div", b.cast(x, _FLOAT), spread_groups(b, scale, groups, size, group_size, _FLOAT)
    )
    return b.cast(ratio, FLOAT8_TYPES[levels])  # `Cast` saturates unless told otherwise
