"""Codes of tables as standard ONNX stores them, so that `DequantizeLinear` decodes them.

Where the levels of a table are whole numbers, or become that by a power of two, the numbers
themselves are stored, in 4 or 8 bits, and the power goes into the scales: ternary weights, small
floats. The codes of 8-bit floats are elements of ONNX's own types. What is neither (NF4, tables of
one's own) has no such form: its codes are stored as they are, and looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.dialect import spread_groups
from qcompile.backends.onnx.dialect_float import FLOAT8_TYPES
from qcompile.backends.onnx.dialect_lookup import look_up
from qcompile.backends.onnx.stored import (
    Placement,
    along_k,
    computed_scale,
    pack_nibbles,
    pack_rows,
    row_bytes,
    row_width,
    unpack_rows,
)
from qcompile.backends.onnx.values import Packed
from qcompile.formats import LookupFormat, StoredWeight, stored_weight
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.lookup.levels import code_bits, levels

_FLOAT = ir.DataType.FLOAT
_POWERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Elements:
    """How the levels of a table stand in elements that `DequantizeLinear` reads.

    Attributes:
        dtype: Of the elements.
        values: The element of each code as a signed byte; None: the code itself, bit for bit.
        factor: What an element is multiplied with to give the level.
    """

    dtype: ir.DataType
    values: tuple[int, ...] | None = None
    factor: float = 1.0


def elements_of(table: str) -> Elements | None:
    """The elements for a table, or None where it has to be looked up."""
    if table in FLOAT8_TYPES:
        return Elements(FLOAT8_TYPES[table])
    numbers = levels(table)
    for power in _POWERS:
        scaled = [number * power for number in numbers]
        if all(isfinite(x) and x.is_integer() and -128 <= x <= 127 for x in scaled):
            narrow = min(scaled) >= -8 and max(scaled) <= 7
            dtype = ir.DataType.INT4 if narrow else ir.DataType.INT8
            return Elements(dtype, tuple(map(int, scaled)), 1 / power)
    return None


def element_bits(table: str) -> int:
    """Bits that a weight takes where it is multiplied."""
    elements = elements_of(table)
    if elements is None:
        return 4 if code_bits(table) <= 4 else 8
    return 4 if elements.dtype == ir.DataType.INT4 else 8


def stored_levels(node: object) -> StoredWeight | None:
    """The weight that a node decodes by a table; None if it does anything else."""
    weight = stored_weight(node)
    is_table = weight is not None and isinstance(weight.format, LookupFormat)
    return weight if weight is not None and is_table and len(weight.shape) == 2 else None


def decoded_matrix(
    b: Builder, weight: StoredWeight, placement: Placement | None = None
) -> ir.Value:
    """The weight as ``[K, N]`` float32, decoded at run time.

    Args:
        b: Where nodes go.
        weight: Its codes are looked up.
        placement: The matrix that it stands for; that of its own two axes unless given.
    """
    format = weight.format
    assert isinstance(format, LookupFormat)
    placement = placement or Placement.of(weight)
    elements = elements_of(format.table)
    scale = computed_scale(b, _scale_node(weight), placement)
    if elements is None:
        return _looked_up_matrix(b, weight, format, scale, placement)
    if elements.factor != 1:
        scale = b.op("Mul", scale, elements.factor)
    codes = _matrix_elements(b, weight, elements, placement)
    if placement.groups == 1:
        return b.op("DequantizeLinear", codes, scale, dtype=_FLOAT, axis=1)
    size = placement.group_size
    return b.op("DequantizeLinear", codes, scale, dtype=_FLOAT, axis=0, block_size=size)


def gathered_rows(b: Builder, weight: StoredWeight, ids: ir.Value) -> ir.Value:
    """Rows of the weight, ``[..., K]`` float32."""
    format = weight.format
    assert isinstance(format, LookupFormat)
    n, k = weight.shape
    name, width = _codes(weight), row_width(code_bits(format.table))
    if width == 8:
        packed = b.weight(name)
    else:
        spec = TensorSpec((n, row_bytes(k, width)), torch.uint8)
        label = f"rows{width}"
        packed = b.arranged_weight(name, label, spec, lambda codes: pack_rows(codes, width))
    codes = unpack_rows(b, b.op("Gather", packed, ids, axis=0), k, width)
    scale = b.op("Gather", b.emitted[_scale_node(weight)], ids, axis=0)
    spread = spread_groups(b, scale, _groups(weight), k, format.group_size, b.dtype)
    return b.op("Mul", look_up(b, codes, format.table), spread)


def _matrix_elements(
    b: Builder, weight: StoredWeight, elements: Elements, placement: Placement
) -> ir.Value:
    n, k = placement.shape
    table = None if elements.values is None else torch.tensor(elements.values, dtype=torch.int8)

    def turn(codes: Tensor) -> Tensor:
        turned = placement.turned(codes)
        return turned if table is None else table[turned.long()]

    if elements.dtype == ir.DataType.INT4:
        spec = TensorSpec((-(-k * n // 2),), torch.uint8)
        packed = Packed(elements.dtype, (k, n))
        return b.arranged_weight(
            _codes(weight), "matrix", spec, lambda codes: pack_nibbles(turn(codes), 0), packed
        )
    spec = TensorSpec((k, n), torch.uint8 if table is None else torch.int8)
    return b.arranged_weight(_codes(weight), "matrix", spec, turn, Packed(elements.dtype, (k, n)))


def _looked_up_matrix(
    b: Builder, weight: StoredWeight, format: LookupFormat, scale: ir.Value, placement: Placement
) -> ir.Value:
    n, k = placement.shape
    if code_bits(format.table) <= 4:
        codes = b.arranged_weight(
            _codes(weight),
            "nibbles",
            TensorSpec((-(-k * n // 2),), torch.uint8),
            lambda codes: pack_nibbles(placement.turned(codes), 0),
            Packed(ir.DataType.UINT4, (k, n)),
        )
    else:
        spec = TensorSpec((k, n), torch.uint8)
        codes = b.arranged_weight(_codes(weight), "transposed", spec, placement.turned)
    return b.op("Mul", look_up(b, codes, format.table), along_k(b, scale, placement))


def _codes(weight: StoredWeight) -> str:
    return str(weight.tensors["codes"].target)


def _scale_node(weight: StoredWeight) -> fx.Node:
    scale = weight.value.args[1]
    assert isinstance(scale, fx.Node)
    return scale


def _groups(weight: StoredWeight) -> int:
    return int(_scale_node(weight).meta["val"].shape[-1])
