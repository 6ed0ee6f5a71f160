"""Codes of the packed format: bit planes, and ternary digits five to a byte.

`qcompile.kernels.cpu.layout` says where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

COLUMNS = 16
"""Columns of a block: lanes of the widest vector."""
UNIT = 8
"""Consecutive k that are stored together."""

_PICTURE = COLUMNS * UNIT
_QUAD = 4  # k
_QUAD_BYTES = COLUMNS * _QUAD
_TRITS = 5  # in a byte
_LEFTOVER_BITS = 2  # of a ternary digit that stands by itself

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CodePacking:
    """How codes become bytes.

    Attributes:
        bits: Of a code.
        ternary: Whether codes are 0, 1 and 2 and stand five to a byte.
    """

    bits: int
    ternary: bool = False

    def size(self, k: int) -> int:
        """Bytes of `k` (a multiple of 8) consecutive codes of 16 columns."""
        if not self.ternary:
            return k // UNIT * COLUMNS * self.bits
        vectors, left = divmod(k // _QUAD, _TRITS)
        return vectors * _QUAD_BYTES + left * (_QUAD_BYTES * _LEFTOVER_BITS // 8)

    def fill(self, out: _Bytes, codes: _Bytes) -> None:
        """Writes codes [16 * blocks, groups * k] to [blocks, groups, size(k)]."""
        blocks, groups, _ = out.shape
        # 4 consecutive k travel as one word.
        words = np.ascontiguousarray(codes).view(np.uint32).reshape(blocks, COLUMNS, groups, -1)
        words = np.ascontiguousarray(words.transpose(0, 2, 3, 1))
        pictures = words.view(np.uint8).reshape(blocks, groups, -1, _PICTURE)
        if self.ternary:
            out[...] = _pack_trits(pictures.reshape(blocks, groups, -1, _QUAD_BYTES))
        else:
            out[...] = _pack_planes(pictures, self.bits).reshape(out.shape)

    def read(self, packed: _Bytes, k: int) -> _Bytes:
        """The inverse of `fill`: [blocks, groups, size(k)] to [16 * blocks, groups * k]."""
        blocks, groups, _ = packed.shape
        if self.ternary:
            pictures = _unpack_trits(packed, k // _QUAD)
        else:
            units = np.ascontiguousarray(packed).reshape(blocks, groups, -1, COLUMNS * self.bits)
            pictures = _unpack_planes(units, self.bits)
        words = np.ascontiguousarray(pictures).view(np.uint32).reshape(blocks, groups, -1, COLUMNS)
        words = np.ascontiguousarray(words.transpose(0, 3, 1, 2))
        return words.view(np.uint8).reshape(blocks * COLUMNS, -1)


def _planes(bits: int) -> Iterator[tuple[int, int, slice]]:
    """Width, lowest bit in the codes and bytes within a unit of each plane."""
    lowest = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, lowest, slice(COLUMNS * lowest, COLUMNS * (lowest + width))
            lowest += width


def _pack_planes(pictures: _Bytes, bits: int) -> _Bytes:
    """[..., 128] codes to [..., 16 * bits] bytes."""
    units = np.empty((*pictures.shape[:-1], COLUMNS * bits), np.uint8)
    for width, lowest, where in _planes(bits):
        mask = np.uint8((1 << width) - 1)
        parts = pictures.reshape(*pictures.shape[:-1], 8 // width, -1)
        plane = units[..., where]
        plane[...] = parts[..., 0, :] >> np.uint8(lowest) & mask
        for part in range(1, 8 // width):
            plane |= (parts[..., part, :] >> np.uint8(lowest) & mask) << np.uint8(part * width)
    return units


def _unpack_planes(units: _Bytes, bits: int) -> _Bytes:
    pictures = np.zeros((*units.shape[:-1], _PICTURE), np.uint8)
    for width, lowest, where in _planes(bits):
        mask = np.uint8((1 << width) - 1)
        parts = pictures.reshape(*pictures.shape[:-1], 8 // width, -1)
        for part in range(8 // width):
            parts[..., part, :] |= (units[..., where] >> np.uint8(part * width) & mask) << np.uint8(
                lowest
            )
    return pictures


def _pack_trits(quads: _Bytes) -> _Bytes:
    """[blocks, groups, quads, 64] digits to [blocks, groups, bytes]."""
    blocks, groups, count, _ = quads.shape
    vectors = count // _TRITS
    whole = quads[:, :, : vectors * _TRITS].reshape(blocks, groups, vectors, _TRITS, _QUAD_BYTES)
    number = np.zeros((blocks, groups, vectors, _QUAD_BYTES), np.uint16)
    for digit in range(_TRITS):
        number = number * np.uint16(3) + whole[..., digit, :]
    # A fraction of 256, rounded up: times 3, each digit in turn overflows the byte.
    fractions = ((number * 256 + 242) // 243).astype(np.uint8)
    left = quads[:, :, vectors * _TRITS :].reshape(blocks, groups, -1, 4, COLUMNS)
    pairs = np.zeros((blocks, groups, left.shape[2], COLUMNS), np.uint8)
    for part in range(4):
        pairs |= left[..., part, :] << np.uint8(part * _LEFTOVER_BITS)
    return np.concatenate(
        (fractions.reshape(blocks, groups, -1), pairs.reshape(blocks, groups, -1)), axis=2
    )


def _unpack_trits(packed: _Bytes, count: int) -> _Bytes:
    blocks, groups, _ = packed.shape
    vectors, left = divmod(count, _TRITS)
    rest = packed[:, :, : vectors * _QUAD_BYTES].reshape(blocks, groups, vectors, 1, _QUAD_BYTES)
    digits = np.empty((blocks, groups, vectors, _TRITS, _QUAD_BYTES), np.uint8)
    for digit in range(_TRITS):
        product = rest.astype(np.uint16) * np.uint16(3)
        digits[..., digit, :] = (product >> 8)[..., 0, :]
        rest = product.astype(np.uint8)
    pairs = packed[:, :, vectors * _QUAD_BYTES :].reshape(blocks, groups, left, 1, COLUMNS)
    shifts = np.arange(4, dtype=np.uint8).reshape(4, 1) * np.uint8(_LEFTOVER_BITS)
    single = (pairs >> shifts) & np.uint8(3)
    return np.concatenate(
        (
            digits.reshape(blocks, groups, -1, _QUAD_BYTES),
            single.reshape(blocks, groups, -1, _QUAD_BYTES),
        ),
        axis=2,
    )
