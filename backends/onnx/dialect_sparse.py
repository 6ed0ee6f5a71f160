"""Numbers that are added to a few places of a matrix, in standard operators."""

from __future__ import annotations

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table

SPARSE = Table()


@SPARSE.register(torch.ops.qc.add_sparse.default)
def _add_sparse(b: Builder, base: ir.Value, index: ir.Value, values: ir.Value) -> ir.Value:
    columns = b.cast(index, ir.DataType.INT64)
    return b.op("ScatterElements", base, columns, b.cast(values, b.dtype), axis=-1, reduction="add")
