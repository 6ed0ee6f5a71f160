"""Codes of a table of levels, or of vectors, in standard operators: looked up, then scaled."""

from __future__ import annotations

import onnx_ir as ir
import torch

import qcompile.ir.dialect  # noqa: F401 -- defines the operators
from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import spread_groups
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError
from qcompile.kernels.lookup.levels import levels as table_of
from qcompile.kernels.lookup_vectors.codebooks import codebook as codebook_of

LOOKUP = Table()


@LOOKUP.register(torch.ops.qc.lookup.default)
def _lookup(
    b: Builder, codes: ir.Value, scale: ir.Value | None, levels: str, group_size: int
) -> ir.Value:
    values = look_up(b, codes, levels)
    if scale is None:
        return values
    groups, size = int(b.shape(scale)[-1]), int(b.shape(codes)[-1])
    return b.op("Mul", values, spread_groups(b, scale, groups, size, group_size, b.dtype))


@LOOKUP.register(torch.ops.qc.lookup_vectors.default)
def _lookup_vectors(
    b: Builder, codes: ir.Value, scale: ir.Value, codebook: str, group_size: int, block: int
) -> ir.Value:
    if block:  # of linear layers, `TurnInputs` leaves none
        raise UnsupportedError("a turned weight that no linear layer multiplies with")
    table = b.constant(codebook_of(codebook), b.dtype)
    vectors = b.op("Gather", table, b.cast(codes, ir.DataType.INT32), axis=0)
    size = int(b.shape(codes)[-1]) * len(codebook_of(codebook)[0])
    values = b.op("Reshape", vectors, [*[0] * (b.rank(codes) - 1), size])
    groups = int(b.shape(scale)[-1])
    return b.op("Mul", values, spread_groups(b, scale, groups, size, group_size, b.dtype))


def look_up(b: Builder, codes: ir.Value, levels: str) -> ir.Value:
    """The level of each code, in the type of the present result.

    Args:
        b: Where nodes go.
        codes: Of any shape and integer type, or elements that are levels themselves.
        levels: Name or numbers of a table; see `qcompile.kernels.lookup.levels`.
    """
    if codes.dtype is not None and codes.dtype.is_floating_point():
        return b.cast(codes, b.dtype)
    table = b.constant(table_of(levels), b.dtype)
    return b.op("Gather", table, b.cast(codes, ir.DataType.INT32), axis=0)
