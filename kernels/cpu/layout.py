"""Packs integer weights for the CPU kernels.

One format serves every instruction set, and is memory-mapped as it is:

    [ceil(N / 16) column blocks][G groups] {
      16 scales in the scale type
      16 zero points (uint8), if the weight has them
      codes: 16 * bits bytes for every 8 k
    }

The codes of 8 k are a picture of 128 bytes, one per code, of which `64 * (k // 4) + 4 * column +
k % 4` is that of (column, k). It is stored in planes: their widths are the powers of two that add
up to `bits`, widest first, and the first has the lowest bits of the codes. A plane of `width` bits
is 16 * width bytes long, and so are the 8 / width parts that it cuts the picture in: part t has
bits [t * width, (t + 1) * width) of every byte. 4 bits are thus 64 bytes whose low nibbles are
k = 0..3 and whose high nibbles are k = 4..7; 6 bits are these and 32 bytes with the codes' upper
two bits.

The last group is padded along K to a multiple of 8 with its zero point, N to a multiple of 16 with
scale 0. `kernels/cpu/include/packed_layout.h` is the same in C++.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

KERNEL_LAYOUT_VERSION = 1

ScaleDtype = Literal["float32", "float16", "bfloat16"]
SCALE_DTYPES: tuple[ScaleDtype, ...] = ("float32", "float16", "bfloat16")
"""Names of the scale types; the index of one is the kernels' attribute `scale_dtype`."""

PACKABLE_BITS = (1, 2, 3, 4, 5, 6, 7, 8)

_COLUMNS = 16
_UNIT = 8
_PICTURE = _COLUMNS * _UNIT

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


def packed_size(
    n: int, k: int, *, bits: int, group_size: int, has_zero_point: bool, scale_dtype: ScaleDtype
) -> int:
    """Returns the bytes of a packed [n, k] weight.

    Raises:
        ValueError: an argument is out of range.
    """
    geometry = _Geometry.of(
        n, k, bits=bits, group_size=group_size, zeros=has_zero_point, scale_dtype=scale_dtype
    )
    return geometry.blocks * geometry.block_bytes


def pack_linear(
    codes: _Bytes,
    scale: npt.NDArray[np.floating],
    zero_point: _Bytes | None = None,
    *,
    bits: int,
    group_size: int,
    scale_dtype: ScaleDtype = "float16",
) -> _Bytes:
    """Packs the weight `(codes - zero_point) * scale`.

    Args:
        codes: [N, K] uint8, each below 2**bits.
        scale: [N, G], floats that `scale_dtype` holds exactly: codes were chosen for them.
        zero_point: [N, G] uint8, each below 2**bits; 2**(bits - 1) everywhere when absent.
        bits: 1 to 8.
        group_size: weights per scale along K, a multiple of 16; 0 for one group per row. The last
            group may be short.
        scale_dtype: how scales are stored.

    Returns:
        The packed bytes, [packed_size(...)] uint8.

    Raises:
        ValueError: shapes, codes or options do not fit together, or a scale would be rounded.
    """
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise ValueError(f"codes must be [N, K] uint8, not {codes.dtype} {list(codes.shape)}")
    n, k = codes.shape
    geometry = _Geometry.of(
        n,
        k,
        bits=bits,
        group_size=group_size,
        zeros=zero_point is not None,
        scale_dtype=scale_dtype,
    )
    if scale.shape != (n, geometry.groups):
        raise ValueError(f"scale has shape {list(scale.shape)} instead of {[n, geometry.groups]}")
    _check_codes("codes", codes, bits)
    if zero_point is not None:
        if zero_point.shape != scale.shape or zero_point.dtype != np.uint8:
            raise ValueError(
                f"zero_point must be {list(scale.shape)} uint8, "
                f"not {zero_point.dtype} {list(zero_point.shape)}"
            )
        _check_codes("zero_point", zero_point, bits)

    scale_bytes = _encode_scales(scale, scale_dtype)
    padded = geometry.pad_codes(codes, zero_point)
    out = np.empty((geometry.blocks, geometry.block_bytes), np.uint8)
    for span, view in geometry.spans(out):
        header = geometry.scale_bytes
        view[:, :, :header] = geometry.by_block(scale_bytes[:, span.groups])
        if zero_point is not None:
            view[:, :, header : header + _COLUMNS] = geometry.by_block(zero_point[:, span.groups])
            header += _COLUMNS
        _fill_codes(view[:, :, header:], padded[:, span.columns], bits)
    return out.reshape(-1)


def unpack_linear(
    packed: _Bytes,
    n: int,
    k: int,
    *,
    bits: int,
    group_size: int,
    has_zero_point: bool,
    scale_dtype: ScaleDtype = "float16",
) -> tuple[_Bytes, _Floats, _Bytes | None]:
    """Returns the codes [n, k], scale [n, G] (float32) and zero_point [n, G] of a packed weight.

    Raises:
        ValueError: `packed` has not the bytes of such a weight.
    """
    geometry = _Geometry.of(
        n, k, bits=bits, group_size=group_size, zeros=has_zero_point, scale_dtype=scale_dtype
    )
    expected = geometry.blocks * geometry.block_bytes
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise ValueError(f"packed must be [{expected}] uint8, not {packed.dtype} {packed.shape}")
    rows = geometry.blocks * _COLUMNS
    codes = np.empty((rows, geometry.padded_k), np.uint8)
    scale = np.empty((rows, geometry.groups), np.float32)
    zero_point = np.empty((rows, geometry.groups), np.uint8) if has_zero_point else None
    for span, view in geometry.spans(packed.reshape(geometry.blocks, geometry.block_bytes)):
        header = geometry.scale_bytes
        stored = view[:, :, :header].reshape(geometry.blocks, -1, _COLUMNS, header // _COLUMNS)
        by_row = np.ascontiguousarray(stored.transpose(0, 2, 1, 3)).reshape(rows, -1)
        scale[:, span.groups] = _decode_scales(by_row, scale_dtype)
        if zero_point is not None:
            zeros = view[:, :, header : header + _COLUMNS].transpose(0, 2, 1)
            zero_point[:, span.groups] = zeros.reshape(rows, -1)
            header += _COLUMNS
        codes[:, span.columns] = _read_codes(view[:, :, header:], bits)
    return codes[:n, :k], scale[:n], None if zero_point is None else zero_point[:n]


@dataclass(frozen=True)
class _Span:
    """A run of groups of equal length, and their columns of the padded codes."""

    groups: slice
    columns: slice


@dataclass(frozen=True)
class _Geometry:
    n: int
    k: int
    bits: int
    group_size: int  # K when there is one group per row
    zeros: bool
    scale_bytes: int  # of the 16 scales of a group

    @classmethod
    def of(
        cls, n: int, k: int, *, bits: int, group_size: int, zeros: bool, scale_dtype: ScaleDtype
    ) -> _Geometry:
        if n <= 0 or k <= 0:
            raise ValueError(f"a weight of shape {[n, k]} cannot be packed")
        if bits not in PACKABLE_BITS:
            raise ValueError(f"bits = {bits} cannot be packed; only {PACKABLE_BITS}")
        if group_size < 0 or group_size % 16 != 0:
            raise ValueError(f"group_size = {group_size} is neither 0 nor a multiple of 16")
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype = {scale_dtype!r} is none of {SCALE_DTYPES}")
        effective = k if group_size == 0 or group_size > k else group_size
        width = 4 if scale_dtype == "float32" else 2
        return cls(n, k, bits, effective, zeros, _COLUMNS * width)

    @property
    def groups(self) -> int:
        return -(-self.k // self.group_size)

    @property
    def blocks(self) -> int:
        return -(-self.n // _COLUMNS)

    @property
    def padded_k(self) -> int:
        return -(-self.k // _UNIT) * _UNIT

    @property
    def header_bytes(self) -> int:
        return self.scale_bytes + (_COLUMNS if self.zeros else 0)

    @property
    def block_bytes(self) -> int:
        return self.groups * self.header_bytes + self.padded_k * _COLUMNS * self.bits // 8

    def spans(self, blocks: _Bytes) -> list[tuple[_Span, _Bytes]]:
        """The full groups and the short last one, each with its view [blocks, groups, bytes]."""
        full = self.k // self.group_size
        columns = full * self.group_size
        split = full * (self.header_bytes + self.group_size * _COLUMNS * self.bits // 8)
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

    def pad_codes(self, codes: _Bytes, zero_point: _Bytes | None) -> _Bytes:
        """Codes as [16 * blocks, padded_k], padded along K with the last group's zero point."""
        rows = self.blocks * _COLUMNS
        if codes.shape == (rows, self.padded_k):
            return np.ascontiguousarray(codes)
        padded = np.zeros((rows, self.padded_k), np.uint8)
        padded[: self.n, : self.k] = codes
        tail = 1 << (self.bits - 1) if zero_point is None else zero_point[:, -1:]
        padded[: self.n, self.k :] = tail
        return padded

    def by_block(self, per_row: _Bytes) -> _Bytes:
        """[n, groups(, bytes)] to [blocks, groups, 16 (* bytes)], with zeros for missing rows."""
        rows = self.blocks * _COLUMNS
        width = per_row.shape[2] if per_row.ndim == 3 else 1
        padded = np.zeros((rows, per_row.shape[1], width), np.uint8)
        padded[: self.n] = per_row.reshape(self.n, per_row.shape[1], width)
        blocked = padded.reshape(self.blocks, _COLUMNS, per_row.shape[1], width)
        by_group: _Bytes = blocked.transpose(0, 2, 1, 3)
        return by_group.reshape(self.blocks, per_row.shape[1], -1)


def _check_codes(name: str, values: _Bytes, bits: int) -> None:
    if bits < 8 and values.size and int(values.max()) >= 1 << bits:
        raise ValueError(f"{name} hold {int(values.max())}, which {bits} bits do not")


def _planes(bits: int) -> Iterator[tuple[int, int, slice]]:
    """Width, lowest bit in the codes and bytes within a unit of each plane."""
    lowest = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, lowest, slice(_COLUMNS * lowest, _COLUMNS * (lowest + width))
            lowest += width


def _fill_codes(out: _Bytes, codes: _Bytes, bits: int) -> None:
    """Writes [16 * blocks, groups * length] codes to [blocks, groups, bytes]."""
    blocks, groups, _ = out.shape
    # 4 consecutive k travel as one word.
    words = np.ascontiguousarray(codes).view(np.uint32).reshape(blocks, _COLUMNS, groups, -1)
    words = np.ascontiguousarray(words.transpose(0, 2, 3, 1))
    pictures = words.view(np.uint8).reshape(blocks, groups, -1, _PICTURE)
    units = np.empty((*pictures.shape[:-1], _COLUMNS * bits), np.uint8)
    for width, lowest, where in _planes(bits):
        mask = np.uint8((1 << width) - 1)
        parts = pictures.reshape(*pictures.shape[:-1], 8 // width, -1)
        plane = units[..., where]
        plane[...] = parts[..., 0, :] >> np.uint8(lowest) & mask
        for part in range(1, 8 // width):
            plane |= (parts[..., part, :] >> np.uint8(lowest) & mask) << np.uint8(part * width)
    out[...] = units.reshape(out.shape)


def _read_codes(packed: _Bytes, bits: int) -> _Bytes:
    """The inverse of `_fill_codes`."""
    blocks, groups, _ = packed.shape
    units = np.ascontiguousarray(packed).reshape(blocks, groups, -1, _COLUMNS * bits)
    pictures = np.zeros((*units.shape[:-1], _PICTURE), np.uint8)
    for width, lowest, where in _planes(bits):
        mask = np.uint8((1 << width) - 1)
        parts = pictures.reshape(*pictures.shape[:-1], 8 // width, -1)
        for part in range(8 // width):
            parts[..., part, :] |= (units[..., where] >> np.uint8(part * width) & mask) << np.uint8(
                lowest
            )
    words = pictures.view(np.uint32).reshape(blocks, groups, -1, _COLUMNS)
    words = np.ascontiguousarray(words.transpose(0, 3, 1, 2))
    return words.view(np.uint8).reshape(blocks * _COLUMNS, -1)


def _encode_scales(scale: npt.NDArray[np.floating], scale_dtype: ScaleDtype) -> _Bytes:
    """[N, G] scales to [N, G, bytes]."""
    single = np.ascontiguousarray(scale, dtype="<f4")
    if scale_dtype == "float32":
        stored = single.view(np.uint8).reshape(*scale.shape, 4)
    elif scale_dtype == "float16":
        with np.errstate(over="ignore"):  # an overflow is caught below
            half = single.astype("<f2")
        stored = half.view(np.uint8).reshape(*scale.shape, 2)
    else:
        words = single.view("<u4") >> np.uint32(16)
        stored = words.astype("<u2").view(np.uint8).reshape(*scale.shape, 2)
    back = _decode_scales(stored.reshape(scale.shape[0], -1), scale_dtype)
    wrong = back != scale
    if wrong.any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"scale[{row}, {group}] = {scale[row, group]!r} is no {scale_dtype}: "
            "round scales before codes are chosen"
        )
    return stored


def _decode_scales(stored: _Bytes, scale_dtype: ScaleDtype) -> _Floats:
    """[N, G * bytes] to [N, G] float32."""
    contiguous = np.ascontiguousarray(stored)
    if scale_dtype == "float32":
        return contiguous.view("<f4").astype(np.float32)
    if scale_dtype == "float16":
        return contiguous.view("<f2").astype(np.float32)
    words: npt.NDArray[np.uint32] = contiguous.view("<u2").astype(np.uint32) << np.uint32(16)
    return words.view(np.float32)
