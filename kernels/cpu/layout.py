"""Packs weights for the CPU kernels.

One format serves every instruction set, and is memory-mapped as it is:

    levels: 2^max(bits, 4) float32, if the coding is "table"
    outer scales, float32: 16 times the weight's, or one per column of a block
    [ceil(N / 16) column blocks][G groups] {
      16 scales in the scale type
      16 zero points (uint8, or float16), if the weight has them
      codes: 16 * bits bytes for every 8 k
    }

The codes of 8 k are a picture of 128 bytes, one per code, of which `64 * (k // 4) + 4 * column +
k % 4` is that of (column, k). It is stored in planes: their widths are the powers of two that add
up to `bits`, widest first, and the first has the lowest bits of the codes. A plane of `width` bits
is 16 * width bytes long, and so are the 8 / width parts that it cuts the picture in: part t has
bits [t * width, (t + 1) * width) of every byte. 4 bits are thus 64 bytes whose low nibbles are
k = 0..3 and whose high nibbles are k = 4..7; 6 bits are these and 32 bytes with the codes' upper
two bits.

Ternary codes stand five to a byte instead. Five consecutive halves of pictures (4 k each) become
64 bytes; a byte is the fraction ceil(256 * v / 243), where v has the five codes for its ternary
digits, the first k highest. The up to four halves that are left in a group follow as planes of 2
bits, 16 bytes each.

The last group is padded along K to a multiple of 8 with the code of 0 (or with code 0), N to a
multiple of 16 with scale 0. `kernels/cpu/include/packed_layout.h` is the same in C++.

What a code stands for is the weight's *coding*: ``"integer"`` code - zero_point; ``"e2m1"`` and
``"e4m3"`` small floats by their bits; ``"ternary"`` code - 1; ``"table"`` levels[code].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from qcompile.kernels.cpu.pack_codes import COLUMNS, UNIT, CodePacking
from qcompile.kernels.cpu.pack_scales import (
    OUTER_SCALES,
    SCALE_DTYPES,
    ScaleDtype,
    decode_scales,
    encode_scales,
    is_coded,
    scale_width,
)
from qcompile.kernels.cpu.weight_layout import CODINGS, Coding, WeightLayout, ZeroDtype

__all__ = [
    "CODINGS",
    "KERNEL_LAYOUT_VERSION",
    "OUTER_SCALES",
    "PACKABLE_BITS",
    "SCALE_DTYPES",
    "Coding",
    "ScaleDtype",
    "UnpackedLinear",
    "WeightLayout",
    "pack_linear",
    "packed_size",
    "unpack_linear",
]

KERNEL_LAYOUT_VERSION = 2

PACKABLE_BITS = CODINGS["integer"]

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class UnpackedLinear:
    """The tensors of a packed weight.

    Attributes:
        codes: [N, K] uint8.
        scale: [N, G] float32, or uint8 codes.
        zero_point: [N, G] uint8 or float32, or None.
        levels: [2^bits] float32, or None.
        outer_scale: [1] or [N] float32, or None.
    """

    codes: _Bytes
    scale: _Floats | _Bytes
    zero_point: _Floats | _Bytes | None
    levels: _Floats | None
    outer_scale: _Floats | None


def packed_size(n: int, k: int, layout: WeightLayout) -> int:
    """Returns the bytes of a packed [n, k] weight.

    Raises:
        ValueError: there is no such shape.
    """
    return _Geometry.of(n, k, layout).bytes


def pack_linear(
    codes: _Bytes,
    scale: npt.NDArray[np.floating] | _Bytes,
    zero_point: npt.NDArray[np.floating] | _Bytes | None = None,
    *,
    bits: int,
    group_size: int,
    scale_dtype: ScaleDtype = "float16",
    coding: Coding = "integer",
    levels: npt.NDArray[np.floating] | None = None,
    outer_scale: _Floats | None = None,
) -> _Bytes:
    """Packs a weight: what its codes stand for, times scales.

    Args:
        codes: [N, K] uint8, each below 2**bits.
        scale: [N, G], floats that `scale_dtype` holds exactly, for which codes were chosen; or
            uint8 codes of such a type.
        zero_point: [N, G] uint8, each below 2**bits, or floats that float16 holds exactly;
            2**(bits - 1) everywhere when absent. Of integers only.
        bits: 1 to 8.
        group_size: weights per scale along K, a multiple of 16; 0 for one group per row. The last
            group may be short.
        scale_dtype: how scales are stored.
        coding: what codes stand for.
        levels: up to 2**bits values, of the coding "table".
        outer_scale: [1] or [N], as `OUTER_SCALES` says for `scale_dtype`.

    Returns:
        The packed bytes, [packed_size(...)] uint8.

    Raises:
        ValueError: shapes, codes or options do not fit together, or a scale or a zero point would
            be rounded.
    """
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise ValueError(f"codes must be [N, K] uint8, not {codes.dtype} {list(codes.shape)}")
    n, k = codes.shape
    layout = WeightLayout(bits, group_size, _zero_dtype(zero_point), scale_dtype, coding)
    geometry = _Geometry.of(n, k, layout)
    if scale.shape != (n, geometry.groups):
        raise ValueError(f"scale has shape {list(scale.shape)} instead of {[n, geometry.groups]}")
    _check_codes("codes", codes, bits, coding)
    zero_bytes = None if zero_point is None else _encode_zeros(zero_point, scale.shape, bits)
    scale_bytes = encode_scales(scale, scale_dtype)
    padded = geometry.pad_codes(codes, zero_point if layout.zero_dtype == "uint8" else None)
    out = np.empty(geometry.bytes, np.uint8)
    prefix = np.concatenate((geometry.pad_levels(levels), geometry.pad_outer(outer_scale)))
    out[: geometry.prefix_bytes] = prefix.astype("<f4").view(np.uint8)
    for span, view in geometry.spans(out):
        header = geometry.scale_bytes
        view[:, :, :header] = geometry.by_block(scale_bytes[:, span.groups])
        if zero_bytes is not None:
            zeros = geometry.by_block(zero_bytes[:, span.groups])
            view[:, :, header : geometry.header_bytes] = zeros
        geometry.packing.fill(view[:, :, geometry.header_bytes :], padded[:, span.columns])
    return out


def unpack_linear(packed: _Bytes, n: int, k: int, layout: WeightLayout) -> UnpackedLinear:
    """The inverse of `pack_linear`.

    Raises:
        ValueError: `packed` has not the bytes of such a weight.
    """
    geometry = _Geometry.of(n, k, layout)
    if packed.dtype != np.uint8 or packed.shape != (geometry.bytes,):
        raise ValueError(
            f"packed must be [{geometry.bytes}] uint8, not {packed.dtype} {packed.shape}"
        )
    rows = geometry.blocks * COLUMNS
    codes = np.empty((rows, geometry.padded_k), np.uint8)
    scale_type = np.uint8 if is_coded(layout.scale_dtype) else np.float32
    scale = np.empty((rows, geometry.groups), scale_type)
    zero_type = np.uint8 if layout.zero_dtype == "uint8" else np.float32
    zero_point = None if layout.zero_dtype is None else np.empty((rows, geometry.groups), zero_type)
    for span, view in geometry.spans(packed):
        header = geometry.header_bytes
        scales = geometry.by_row(view[:, :, : geometry.scale_bytes])
        scale[:, span.groups] = decode_scales(scales, layout.scale_dtype)
        if zero_point is not None:
            assert layout.zero_dtype is not None
            zeros = geometry.by_row(view[:, :, geometry.scale_bytes : header])
            zero_point[:, span.groups] = decode_scales(zeros, layout.zero_dtype)
        columns = span.columns.stop - span.columns.start
        length = columns // (span.groups.stop - span.groups.start)
        codes[:, span.columns] = geometry.packing.read(view[:, :, header:], length)
    floats = packed[: geometry.prefix_bytes].view("<f4").astype(np.float32)
    levels, outer = floats[: geometry.level_count], floats[geometry.level_count :]
    return UnpackedLinear(
        codes[:n, :k],
        scale[:n],
        None if zero_point is None else zero_point[:n],
        levels[: 1 << layout.bits] if layout.coding == "table" else None,
        outer[: {"weight": 1, "row": n}[OUTER_SCALES[layout.scale_dtype]]] if outer.size else None,
    )


@dataclass(frozen=True)
class _Span:
    """A run of groups of equal length, and their columns of the padded codes."""

    groups: slice
    columns: slice


@dataclass(frozen=True)
class _Geometry:
    n: int
    k: int
    group_size: int  # K when there is one group per row
    layout: WeightLayout

    @classmethod
    def of(cls, n: int, k: int, layout: WeightLayout) -> _Geometry:
        if n <= 0 or k <= 0:
            raise ValueError(f"a weight of shape {[n, k]} cannot be packed")
        group_size = layout.group_size
        effective = k if group_size == 0 or group_size > k else group_size
        return cls(n, k, effective, layout)

    @property
    def packing(self) -> CodePacking:
        return CodePacking(self.layout.bits, ternary=self.layout.coding == "ternary")

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def blocks(self) -> int:
        return -(-self.n // COLUMNS)

    @property
    def padded_k(self) -> int:
        return -(-self.k // UNIT) * UNIT

    @property
    def scale_bytes(self) -> int:
        """Of the 16 scales of a group."""
        return COLUMNS * scale_width(self.layout.scale_dtype)

    @property
    def level_count(self) -> int:
        return 1 << max(self.layout.bits, 4) if self.layout.coding == "table" else 0

    @property
    def outer_count(self) -> int:
        shared = OUTER_SCALES.get(self.layout.scale_dtype)
        if shared is None:
            return 0
        return COLUMNS if shared == "weight" else self.blocks * COLUMNS

    @property
    def prefix_bytes(self) -> int:
        return 4 * (self.level_count + self.outer_count)

    @property
    def header_bytes(self) -> int:
        zero_dtype = self.layout.zero_dtype
        return self.scale_bytes + (0 if zero_dtype is None else COLUMNS * scale_width(zero_dtype))

    @property
    def block_bytes(self) -> int:
        last = self.padded_k - (self.groups - 1) * self.group_size
        full = self.header_bytes + self.packing.size(self.group_size)
        return (self.groups - 1) * full + self.header_bytes + self.packing.size(last)

    @property
    def bytes(self) -> int:
        return self.prefix_bytes + self.blocks * self.block_bytes

    def spans(self, packed: _Bytes) -> list[tuple[_Span, _Bytes]]:
        """The full groups and the short last one, each with its view [blocks, groups, bytes]."""
        blocks = packed[self.prefix_bytes :].reshape(self.blocks, self.block_bytes)
        full = self.k // self.group_size
        columns = full * self.group_size
        split = full * (self.header_bytes + self.packing.size(self.group_size))
        if full == self.groups:  # a lone group may be padded, too
            columns, split = self.padded_k, self.block_bytes
        result = []
        if full > 0:
            view = blocks[:, :split].reshape(self.blocks, full, -1)
            result.append((_Span(slice(0, full), slice(0, columns)), view))
        if full < self.groups:
            view = blocks[:, split:].reshape(self.blocks, 1, -1)
            result.append((_Span(slice(full, full + 1), slice(columns, self.padded_k)), view))
        return result

    def pad_codes(
        self, codes: _Bytes, zero_point: npt.NDArray[np.floating] | _Bytes | None
    ) -> _Bytes:
        """Codes as [16 * blocks, padded_k]; a zero point is the code of 0, or None."""
        rows = self.blocks * COLUMNS
        if codes.shape == (rows, self.padded_k):
            return np.ascontiguousarray(codes)
        padded = np.zeros((rows, self.padded_k), np.uint8)
        padded[: self.n, : self.k] = codes
        if zero_point is not None:
            padded[: self.n, self.k :] = zero_point[:, -1:]
        else:
            zero = {"integer": 1 << (self.layout.bits - 1), "ternary": 1}.get(self.layout.coding, 0)
            padded[: self.n, self.k :] = zero
        return padded

    def pad_levels(self, levels: npt.NDArray[np.floating] | None) -> _Floats:
        """The levels, the last one repeated; nothing where the coding has none."""
        if (levels is None) == (self.layout.coding == "table"):
            raise ValueError(
                f"levels are given for the coding 'table' only, not {self.layout.coding!r}"
            )
        if levels is None:
            return np.empty(0, np.float32)
        if levels.ndim != 1 or not 1 <= levels.size <= 1 << self.layout.bits:
            raise ValueError(f"{self.layout.bits} bits cannot tell levels {list(levels.shape)}")
        return np.pad(levels.astype(np.float32), (0, self.level_count - levels.size), mode="edge")

    def pad_outer(self, outer_scale: _Floats | None) -> _Floats:
        """The outer scales of every column: nothing where there are none."""
        scale_dtype = self.layout.scale_dtype
        shared = OUTER_SCALES.get(scale_dtype)
        expected = None if shared is None else (1,) if shared == "weight" else (self.n,)
        found = None if outer_scale is None else outer_scale.shape
        if found != expected:
            raise ValueError(
                f"outer_scale has shape {found} instead of {expected} for {scale_dtype} scales"
            )
        if outer_scale is None:
            return np.empty(0, np.float32)
        mode: Literal["edge", "constant"] = "edge" if shared == "weight" else "constant"
        return np.pad(outer_scale, (0, self.outer_count - outer_scale.size), mode=mode)

    def by_block(self, per_row: _Bytes) -> _Bytes:
        """[n, groups(, bytes)] to [blocks, groups, 16 (* bytes)], with zeros for missing rows."""
        rows = self.blocks * COLUMNS
        width = per_row.shape[2] if per_row.ndim == 3 else 1
        padded = np.zeros((rows, per_row.shape[1], width), np.uint8)
        padded[: self.n] = per_row.reshape(self.n, per_row.shape[1], width)
        blocked = padded.reshape(self.blocks, COLUMNS, per_row.shape[1], width)
        by_group: _Bytes = blocked.transpose(0, 2, 1, 3)
        return by_group.reshape(self.blocks, per_row.shape[1], -1)

    def by_row(self, by_group: _Bytes) -> _Bytes:
        """[blocks, groups, 16 * bytes] to [16 * blocks, groups * bytes]."""
        parts = by_group.reshape(self.blocks, by_group.shape[1], COLUMNS, -1)
        rows = np.ascontiguousarray(parts.transpose(0, 2, 1, 3))
        return rows.reshape(self.blocks * COLUMNS, -1)


def _zero_dtype(zero_point: npt.NDArray[np.floating] | _Bytes | None) -> ZeroDtype | None:
    if zero_point is None:
        return None
    return "float16" if np.issubdtype(zero_point.dtype, np.floating) else "uint8"


def _encode_zeros(
    zero_point: npt.NDArray[np.floating] | _Bytes, shape: tuple[int, ...], bits: int
) -> _Bytes:
    """[N, G] zero points to [N, G, bytes]."""
    dtype = _zero_dtype(zero_point)
    if zero_point.shape != shape or (dtype == "uint8" and zero_point.dtype != np.uint8):
        raise ValueError(
            f"zero_point must be {list(shape)} uint8 or floats, "
            f"not {zero_point.dtype} {list(zero_point.shape)}"
        )
    assert dtype is not None
    if dtype == "uint8":
        _check_codes("zero_point", zero_point, bits)
    return encode_scales(zero_point, dtype, name="zero_point")


def _check_codes(
    name: str,
    values: npt.NDArray[np.floating] | _Bytes,
    bits: int,
    coding: Coding = "integer",
) -> None:
    largest = 2 if coding == "ternary" else (1 << bits) - 1
    if values.size and int(values.max()) > largest:
        kind = "ternary digits" if coding == "ternary" else f"{bits} bits"
        raise ValueError(f"{name} hold {int(values.max())}, which {kind} do not")
