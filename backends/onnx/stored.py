"""Integer codes as standard ONNX stores them.

Codes of up to 4 bits stand in 4-bit elements, wider ones in bytes: standard operators multiply by
no others. Symmetric codes become signed ones around 0, which need no zero point; asymmetric ones
keep their zero points. Scales keep the type that they are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, fx

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.values import Packed
from qcompile.ir import dialect
from qcompile.ir.weights import TensorSpec

Arrange = Callable[[Tensor], Tensor]

_ROW_CONTAINERS = (1, 2, 4, 8)


@dataclass(frozen=True)
class StoredCodes:
    """The codes, scales and zero points behind a `qc.dequantize` call that decodes a weight.

    Attributes:
        codes: Name of the codes, ``[N, K]`` uint8, in the program's store.
        scale: Name of the scales, ``[N, G]``.
        zero_point: Name of the zero points, ``[N, G]`` uint8; None: ``2^(bits-1)`` everywhere.
        bits: Width of a code.
        group_size: Codes per scale along K; 0 is one group.
        shape: ``(N, K)``.
        groups: ``G``.
        scale_dtype: Of the stored scales.
    """

    codes: str
    scale: str
    zero_point: str | None
    bits: int
    group_size: int
    shape: tuple[int, int]
    groups: int
    scale_dtype: torch.dtype

    @classmethod
    def behind(cls, node: object) -> StoredCodes | None:
        """What a node decodes; None if it does anything else, or not to a matrix."""
        if not isinstance(node, fx.Node) or node.target is not dialect.dequantize:
            return None
        codes, scale, zero_point, bits, group_size = node.args
        stored = [n for n in (codes, scale, zero_point) if n is not None]
        if not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in stored):
            return None
        assert isinstance(codes, fx.Node)
        assert isinstance(scale, fx.Node)
        assert isinstance(bits, int)
        assert isinstance(group_size, int)
        if codes.meta["val"].dim() != 2 or codes.meta["val"].dtype != torch.uint8:
            return None
        n, k = codes.meta["val"].shape
        return cls(
            str(codes.target),
            str(scale.target),
            str(zero_point.target) if isinstance(zero_point, fx.Node) else None,
            bits,
            group_size if group_size < k else 0,
            (int(n), int(k)),
            int(scale.meta["val"].shape[1]),
            scale.meta["val"].dtype,
        )

    @property
    def container(self) -> int:
        """Bits that a code takes in a matrix: 4 or 8."""
        return 4 if self.bits <= 4 else 8

    @property
    def row_container(self) -> int:
        """Bits that a code takes in a table of rows: 1, 2, 4 or 8."""
        return next(width for width in _ROW_CONTAINERS if width >= self.bits)


def matrix_codes(b: Builder, stored: StoredCodes) -> ir.Value:
    """The codes as ``[K, N]``, in the narrowest type that `DequantizeLinear` reads."""
    n, k = stored.shape
    signed = stored.zero_point is None
    offset = 2 ** (stored.bits - 1) if signed else 0
    if stored.container == 8:
        dtype = torch.int8 if signed else torch.uint8

        def turn(codes: Tensor) -> Tensor:
            return (codes.t().to(torch.int16) - offset).to(dtype)

        return b.arranged_weight(stored.codes, "matrix", TensorSpec((k, n), dtype), turn)

    packed = Packed(ir.DataType.INT4 if signed else ir.DataType.UINT4, (k, n))
    spec = TensorSpec((-(-k * n // 2),), torch.uint8)
    return b.arranged_weight(
        stored.codes, "matrix", spec, lambda codes: pack_nibbles(codes.t(), offset), packed
    )


def byte_codes(b: Builder, stored: StoredCodes) -> ir.Value:
    """The codes as they are, ``[K, N]`` uint8, for integer products."""
    n, k = stored.shape
    spec = TensorSpec((k, n), torch.uint8)
    return b.arranged_weight(stored.codes, "transposed", spec, lambda codes: codes.t())


def matrix_scale(b: Builder, stored: StoredCodes) -> ir.Value:
    """The scales as float32: ``[G, N]``, or ``[N]`` where there is one per column."""
    shape, arrange = _by_column(stored)
    spec = TensorSpec(shape, stored.scale_dtype)
    # Stored as they are: run times fold the cast of a constant when they load the model.
    return b.cast(b.arranged_weight(stored.scale, "matrix", spec, arrange), ir.DataType.FLOAT)


def matrix_zero_point(b: Builder, stored: StoredCodes, container: int) -> ir.Value | None:
    """The zero points, shaped as the scales, in elements of a width; None if symmetric."""
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


def _by_column(stored: StoredCodes) -> tuple[tuple[int, ...], Arrange]:
    n = stored.shape[0]
    if stored.groups == 1:
        return (n,), lambda rows: rows.reshape(-1)
    return (stored.groups, n), lambda rows: rows.t()
