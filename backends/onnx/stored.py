"""Integer codes as standard ONNX stores them.

Codes of up to 4 bits stand in 4-bit elements, wider ones in bytes: standard operators multiply by
no others. Symmetric codes become signed ones around 0, which need no zero point; asymmetric ones
keep their zero points. Scales keep the type that they are stored in. `DequantizeLinear` takes no
zero points that are floats: they are subtracted behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.values import Packed
from qcompile.formats import IntegerFormat, IntegerScaleFormat, StoredWeight, stored_weight
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.quantize.groups import group_count

Arrange = Callable[[Tensor], Tensor]

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
_ROW_CONTAINERS = (1, 2, 4, 8)


MATRIX = (1, 0)
"""The axes of a matrix ``[N, K]`` as ``[K, N]`` has them."""


@dataclass(frozen=True)
class Placement:
    """How a weight stands where it is multiplied with from the left: as one matrix ``[K, N]``.

    Attributes:
        order: Of the axes of what is stored, ``[..., K]`` or, of scales, ``[..., G]``; what comes
            out is read as ``[K, N]`` or ``[G, N]``.
        shape: ``(N, K)`` of the matrix.
        group_size: Codes per scale along K; 0 is one group.
        groups: ``G``.
    """

    order: tuple[int, ...]
    shape: tuple[int, int]
    group_size: int
    groups: int

    @staticmethod
    def of(weight: StoredWeight) -> Placement:
        """That of a matrix ``[N, K]`` by itself: turned."""
        n, k = weight.shape
        size = weight.format.group_size
        return Placement(MATRIX, (n, k), size if size < k else 0, group_count(k, size))

    def turned(self, stored: Tensor) -> Tensor:
        """Codes, scales or zero points as ``[K, N]`` or ``[G, N]``."""
        return stored.permute(self.order).reshape(-1, self.shape[0])


@dataclass(frozen=True)
class StoredCodes:
    """The codes, scales and zero points behind a `qc.dequantize` call that decodes a weight.

    Attributes:
        codes: Name of the codes, ``[..., K]`` uint8, in the program's store.
        scale: The scales, ``[..., G]``: stored, or computed from what is.
        zero_point: Name of the zero points, ``[..., G]``; None: ``2^(bits-1)`` everywhere.
        has_float_zero_points: Whether they are float16, and not uint8.
        bits: Width of a code.
        placement: The matrix that it stands for.
    """

    codes: str
    scale: fx.Node
    zero_point: str | None
    has_float_zero_points: bool
    bits: int
    placement: Placement

    @classmethod
    def behind(cls, node: object) -> StoredCodes | None:
        """What a node decodes; None if it does anything else, or not to a matrix."""
        weight = stored_weight(node)
        if weight is None or not isinstance(weight.format, IntegerFormat | IntegerScaleFormat):
            return None
        return cls.of(weight, Placement.of(weight)) if len(weight.shape) == 2 else None

    @classmethod
    def of(cls, weight: StoredWeight, placement: Placement) -> StoredCodes:
        """A weight of integers as a matrix."""
        format, tensors = weight.format, weight.tensors
        assert isinstance(format, IntegerFormat | IntegerScaleFormat)
        scale = weight.value.args[1]
        assert isinstance(scale, fx.Node)
        zero_point = tensors.get("zero_point")
        return cls(
            str(tensors["codes"].target),
            scale,
            None if zero_point is None else str(zero_point.target),
            isinstance(format, IntegerFormat) and format.has_float_zero_points,
            format.bits,
            placement,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.placement.shape

    @property
    def groups(self) -> int:
        """Scales per column."""
        return self.placement.groups

    @property
    def group_size(self) -> int:
        """Codes per scale along K; 0 is one group."""
        return self.placement.group_size

    @property
    def container(self) -> int:
        """Bits that a code takes in a matrix: 4 or 8."""
        return 4 if self.bits <= 4 else 8

    @property
    def row_container(self) -> int:
        """Bits that a code takes in a table of rows: 1, 2, 4 or 8."""
        return row_width(self.bits)


def decoded_codes(b: Builder, stored: StoredCodes) -> ir.Value:
    """The weight as ``[K, N]`` float32, decoded at run time."""
    if stored.has_float_zero_points:
        one = b.constant(1.0, _FLOAT)
        steps = b.op("DequantizeLinear", matrix_codes(b, stored), one, dtype=_FLOAT)
        shape, arrange = _by_column(stored)
        spec = TensorSpec(shape, torch.float16)
        assert stored.zero_point is not None
        zeros = b.cast(b.arranged_weight(stored.zero_point, "matrix", spec, arrange), _FLOAT)
        moved = b.op("Sub", steps, along_k(b, zeros, stored.placement))
        return b.op("Mul", moved, along_k(b, matrix_scale(b, stored), stored.placement))
    zero_point = matrix_zero_point(b, stored, stored.container)
    operands = (matrix_codes(b, stored), matrix_scale(b, stored), zero_point)
    # One for each product: run times fuse the two only where nothing else reads the first.
    if stored.groups == 1:
        return b.op("DequantizeLinear", *operands, dtype=_FLOAT, axis=1)
    return b.op("DequantizeLinear", *operands, dtype=_FLOAT, axis=0, block_size=stored.group_size)


def matrix_codes(b: Builder, stored: StoredCodes) -> ir.Value:
    """The codes as ``[K, N]``, in the narrowest type that `DequantizeLinear` reads."""
    n, k = stored.shape
    signed = stored.zero_point is None
    offset = 2 ** (stored.bits - 1) if signed else 0
    if stored.container == 8:
        dtype = torch.int8 if signed else torch.uint8

        def turn(codes: Tensor) -> Tensor:
            return (stored.placement.turned(codes).to(torch.int16) - offset).to(dtype)

        return b.arranged_weight(stored.codes, "matrix", TensorSpec((k, n), dtype), turn)

    packed = Packed(ir.DataType.INT4 if signed else ir.DataType.UINT4, (k, n))
    spec = TensorSpec((-(-k * n // 2),), torch.uint8)
    turned = stored.placement.turned
    return b.arranged_weight(
        stored.codes, "matrix", spec, lambda codes: pack_nibbles(turned(codes), offset), packed
    )


def byte_codes(b: Builder, stored: StoredCodes) -> ir.Value:
    """The codes as they are, ``[K, N]`` uint8, for integer products."""
    n, k = stored.shape
    spec = TensorSpec((k, n), torch.uint8)
    return b.arranged_weight(stored.codes, "transposed", spec, lambda codes: codes.t())


def matrix_scale(b: Builder, stored: StoredCodes) -> ir.Value:
    """The scales as float32: ``[G, N]``, or ``[N]`` where there is one per column."""
    if stored.scale.op != "get_attr":
        return computed_scale(b, stored.scale, stored.placement)
    shape, arrange = _by_column(stored)
    spec = TensorSpec(shape, stored.scale.meta["val"].dtype)
    # Stored as they are: run times fold the cast of a constant when they load the model.
    return b.cast(b.arranged_weight(str(stored.scale.target), "matrix", spec, arrange), _FLOAT)


def computed_scale(b: Builder, node: fx.Node, placement: Placement) -> ir.Value:
    """What a node of the program gives as `matrix_scale` does; run times fold it."""
    scale = b.cast(b.emitted[node], _FLOAT)
    if placement.groups == 1:
        return b.op("Reshape", scale, [-1])
    scale = b.op("Transpose", scale, perm=list(placement.order))
    if placement.order == MATRIX:
        return scale
    return b.op("Reshape", scale, [placement.groups, placement.shape[0]])


def along_k(b: Builder, per_group: ir.Value, placement: Placement) -> ir.Value:
    """``[G, N]`` as ``[K, N]``; ``[N]``, one for each column, as it is."""
    if placement.groups == 1:
        return per_group
    places = [row // placement.group_size for row in range(placement.shape[1])]
    return b.op("Gather", per_group, b.constant(places, ir.DataType.INT64), axis=0)


def matrix_zero_point(b: Builder, stored: StoredCodes, container: int) -> ir.Value | None:
    """The zero points, which are codes, shaped as the scales, in elements of a width; or None."""
    if stored.zero_point is None:
        return None
    shape, arrange = _by_column(stored)
    if container == 8:
        spec = TensorSpec(shape, torch.uint8)
        return b.arranged_weight(stored.zero_point, "bytes", spec, arrange)
    elements = stored.groups * stored.shape[0]
    return b.arranged_weight(
        stored.zero_point,
        "nibbles",
        TensorSpec((-(-elements // 2),), torch.uint8),
        lambda points: pack_nibbles(arrange(points), 0),
        Packed(ir.DataType.UINT4, shape),
    )


def row_codes(b: Builder, stored: StoredCodes) -> ir.Value:
    """The codes as ``[N, bytes]`` uint8, as `pack_rows` writes them."""
    n, k = stored.shape
    width = stored.row_container
    if width == 8:
        return b.weight(stored.codes)
    spec = TensorSpec((n, row_bytes(k, width)), torch.uint8)
    return b.arranged_weight(
        stored.codes, f"rows{width}", spec, lambda codes: pack_rows(codes, width)
    )


def row_width(bits: int) -> int:
    """Bits that a code takes in a table of rows: 1, 2, 4 or 8."""
    return next(width for width in _ROW_CONTAINERS if width >= bits)


def row_bytes(k: int, width: int) -> int:
    """Bytes of a row of `k` codes of a width."""
    return -(-k * width // 8)


def pack_nibbles(codes: Tensor, offset: int) -> Tensor:
    """Two 4-bit elements a byte, the first in the low half, of ``codes - offset``."""
    flat = (codes.reshape(-1).to(torch.int16) - offset).to(torch.uint8) & 15
    if len(flat) % 2:
        flat = torch.nn.functional.pad(flat, (0, 1))
    return flat[0::2] | (flat[1::2] << 4)


def pack_rows(codes: Tensor, width: int) -> Tensor:
    """Rows of codes ``[N, K]`` cut into ``8 / width`` parts that share the bytes of one.

    Part ``p`` has columns ``p * bytes`` to ``(p + 1) * bytes`` and the bits from ``p * width``, so
    that unpacking is a shift and a mask for each part, and one concatenation.
    """
    size = row_bytes(codes.shape[1], width)
    parts = 8 // width
    padded = torch.nn.functional.pad(codes, (0, parts * size - codes.shape[1]))
    packed = torch.zeros(codes.shape[0], size, dtype=torch.uint8)
    for part, columns in enumerate(padded.split(size, dim=1)):
        packed |= columns << (part * width)
    return packed


def unpack_rows(b: Builder, rows: ir.Value, k: int, width: int) -> ir.Value:
    """Codes ``[..., k]`` uint8 from rows of bytes that `pack_rows` wrote."""
    if width == 8:
        return rows
    mask = b.constant(2**width - 1, _UINT8)
    parts = [
        rows if shift == 0 else b.op("BitShift", rows, b.constant(shift, _UINT8), direction="RIGHT")
        for shift in range(0, 8, width)
    ]
    # The highest bits are alone after their shift.
    masked = [b.op("BitwiseAnd", part, mask) for part in parts[:-1]]
    codes = b.op("Concat", *masked, parts[-1], axis=-1)
    if row_bytes(k, width) * len(parts) == k:
        return codes
    return b.op("Slice", codes, [0], [k], [-1], [1])


def _by_column(stored: StoredCodes) -> tuple[tuple[int, ...], Arrange]:
    n = stored.shape[0]
    if stored.groups == 1:
        return (n,), lambda rows: rows.reshape(-1)
    return (stored.groups, n), stored.placement.turned
