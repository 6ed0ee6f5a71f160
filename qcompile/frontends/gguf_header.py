"""The header of a GGUF file, walked with every bound checked before it is trusted.

A GGUF file is ``magic, version, counts, metadata, tensor infos, padding, data``. All counts and
lengths come from the file, so each is compared with the bytes that are left before anything is
read or allocated. The `gguf` package's own reader trusts the file; it may be given one only after
`read_header` has accepted it.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from qcompile.errors import ModelError

MetadataValue = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MIN_METADATA_BYTES = 8 + 4 + 1  # empty key, type, one-byte value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # empty name, no dimensions, type, offset
_MAX_SHOWN_LENGTH = 200

# GGUF value types (the specification's numbers) as struct formats.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_UINT32 = 4
_STRING = 8
_ARRAY = 9


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor stands in the file.

    Attributes:
        name: Its name in the file, such as ``"blk.0.attn_q.weight"``.
        shape: Outermost dimension first (the file has them innermost first).
        type_id: The number of its GGML type.
        offset: First byte, from the start of the file.
        bytes: Size of the stored data.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A validated header.

    Attributes:
        metadata: Scalars and strings, decoded.
        arrays: Arrays: key to (element type, count, offset of the first element).
        tensors: All tensors, in the order of the file.
        bytes: Size of the header; the data begins at the next multiple of the alignment.
    """

    path: Path
    metadata: Mapping[str, int | float | bool | str]
    arrays: Mapping[str, tuple[int, int, int]]
    tensors: tuple[GgufTensor, ...]
    bytes: int

    def value(self, key: str) -> MetadataValue | None:
        """A metadata value, arrays decoded on demand; None if there is no such key.

        Raises:
            ModelError: If a string in it is not UTF-8.
        """
        if key in self.metadata:
            return self.metadata[key]
        if key not in self.arrays:
            return None
        kind, count, offset = self.arrays[key]
        with (
            self.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            cursor = _Cursor(self.path, data, offset)
            if kind == _STRING:
                return [cursor.text(f"an element of '{key}'") for _ in range(count)]
            return list(cursor.scalars(_SCALARS[kind], count, f"the array '{key}'"))

    def integer(self, key: str) -> int | None:
        """A metadata value that has to be a whole number; None if there is no such key.

        Raises:
            ModelError: If it is something else.
        """
        value = self.value(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"'{self.path}': metadata '{key}' should be an integer")
        return value


def read_header(path: Path, block_sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Reads and validates the header of a GGUF file.

    Args:
        path: The file.
        block_sizes: GGML type number to (elements per block, bytes per block).

    Raises:
        ModelError: If the file is missing, no GGUF, truncated, or inconsistent; says where.
    """
    try:
        with path.open("rb") as file:
            if not file.seek(0, 2):
                raise ModelError(f"'{path}' is empty", remedy="fetch the file again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(path, data, block_sizes).header()
    except OSError as error:
        raise ModelError(
            f"cannot read the GGUF file '{path}': {error.strerror or error}",
            remedy="check the path and its permissions",
        ) from error


@dataclass
class _Cursor:
    """A position in the file that never passes its end."""

    path: Path
    data: mmap.mmap
    offset: int = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.offset

    def require(self, size: int, what: str) -> None:
        if size > self.left:
            raise ModelError(
                f"'{self.path}' is truncated or damaged: {what} needs {size} bytes at offset "
                f"{self.offset}, the file has {self.left} left",
                remedy="fetch the file again",
            )

    def scalars(self, code: str, count: int, what: str) -> tuple[int | float | bool, ...]:
        size = struct.calcsize(f"<{code}") * count
        self.require(size, what)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.offset)
        self.offset += size
        return values

    def integer(self, code: str, what: str) -> int:
        return int(self.scalars(code, 1, what)[0])

    def skip_text(self, what: str) -> None:
        size = self.integer("Q", what)
        self.require(size, what)
        self.offset += size

    def text(self, what: str) -> str:
        size = self.integer("Q", what)
        self.require(size, what)
        raw = self.data[self.offset : self.offset + size]
        self.offset += size
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"'{self.path}' is damaged: {what} at offset {self.offset - size} is not UTF-8",
                remedy="fetch the file again",
            ) from error


@dataclass
class _Walk:
    """One pass over the header; `header` is its only entry."""

    path: Path
    data: mmap.mmap
    block_sizes: Mapping[int, tuple[int, int]]
    metadata: dict[str, int | float | bool | str] = field(default_factory=dict)
    arrays: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cursor = _Cursor(self.path, self.data)

    def header(self) -> GgufHeader:
        self._check_magic_and_version()
        tensor_count = self._count("tensors", _MIN_TENSOR_BYTES)
        metadata_count = self._count("metadata entries", _MIN_METADATA_BYTES)
        for _ in range(metadata_count):
            self._metadata_entry()
        alignment = self._alignment()
        infos = [self._tensor_info() for _ in range(tensor_count)]
        end = self.cursor.offset
        start = -(-end // alignment) * alignment
        tensors = tuple(self._place(info, start) for info in infos)
        self._check_unique(tensors)
        self._check_extents(tensors)
        return GgufHeader(self.path, self.metadata, self.arrays, tensors, end)

    def _check_magic_and_version(self) -> None:
        if self.data[:4] != _MAGIC:
            raise ModelError(
                f"'{self.path}' is not a GGUF file (it begins with {self.data[:4]!r})",
                remedy="give a .gguf file, or the directory of a Hugging Face model",
            )
        self.cursor.offset = 4
        version = self.cursor.integer("I", "the version")
        if version in _VERSIONS:
            return
        if version & 0xFFFF == 0:
            raise ModelError(
                f"'{self.path}' is a big-endian GGUF file",
                remedy="convert it with gguf_convert_endian.py of llama.cpp",
            )
        raise ModelError(
            f"'{self.path}' has GGUF version {version}; versions 2 and 3 can be read",
            remedy="convert the model again with a recent llama.cpp",
        )

    def _count(self, what: str, least_bytes: int) -> int:
        count = self.cursor.integer("Q", f"the number of {what}")
        self.cursor.require(count * least_bytes, f"a list of {count} {what}")
        return count

    def _metadata_entry(self) -> None:
        key = self.cursor.text("a metadata key")
        if key in self.metadata or key in self.arrays:
            raise self._damaged(f"metadata key '{_shown(key)}' stands in it twice")
        what = f"metadata '{_shown(key)}'"
        kind = self.cursor.integer("I", what)
        if kind == _STRING:
            self.metadata[key] = self.cursor.text(what)
        elif kind == _ARRAY:
            self.arrays[key] = self._array(what)
        elif kind in _SCALARS:
            self.metadata[key] = self.cursor.scalars(_SCALARS[kind], 1, what)[0]
            if key == "general.alignment" and kind != _UINT32:
                raise self._damaged("'general.alignment' is not an unsigned 32-bit integer")
        else:
            raise self._damaged(f"{what} has the unknown value type {kind}")

    def _array(self, what: str) -> tuple[int, int, int]:
        kind = self.cursor.integer("I", what)
        count = self.cursor.integer("Q", what)
        offset = self.cursor.offset
        if kind == _STRING:
            self.cursor.require(8 * count, f"{what} with {count} strings")
            for _ in range(count):
                self.cursor.skip_text(f"an element of {what}")
        elif kind in _SCALARS:
            size = struct.calcsize(f"<{_SCALARS[kind]}") * count
            self.cursor.require(size, f"{what} with {count} elements")
            self.cursor.offset += size
        elif kind == _ARRAY:
            raise self._damaged(f"{what} is an array of arrays, which no model uses")
        else:
            raise self._damaged(f"{what} has the unknown element type {kind}")
        return kind, count, offset

    def _alignment(self) -> int:
        alignment = int(self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
        if alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"'general.alignment' is {alignment}, no power of two")
        return alignment

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.cursor.text("a tensor name")
        what = f"the description of tensor '{_shown(name)}'"
        n_dims = self.cursor.integer("I", what)
        if n_dims > _MAX_DIMS:
            raise self._damaged(f"tensor '{_shown(name)}' has {n_dims} dimensions")
        dims = tuple(int(size) for size in self.cursor.scalars("Q", n_dims, what))
        type_id = self.cursor.integer("I", what)
        offset = self.cursor.integer("Q", what)
        return name, dims, type_id, offset

    def _place(self, info: tuple[str, tuple[int, ...], int, int], start: int) -> GgufTensor:
        name, dims, type_id, offset = info
        if type_id not in self.block_sizes:
            raise ModelError(
                f"'{self.path}': tensor '{_shown(name)}' has the unknown type {type_id}",
                remedy="update the package 'gguf', or fetch the file again",
            )
        block, block_bytes = self.block_sizes[type_id]
        row = dims[0] if dims else 1
        if row % block:
            raise self._damaged(
                f"tensor '{_shown(name)}' has rows of {row} elements in blocks of {block}"
            )
        return GgufTensor(
            name=name,
            shape=dims[::-1],
            type_id=type_id,
            offset=start + offset,
            bytes=prod(dims) // block * block_bytes,
        )

    def _check_unique(self, tensors: tuple[GgufTensor, ...]) -> None:
        seen: set[str] = set()
        for tensor in tensors:
            if tensor.name in seen:
                raise self._damaged(f"tensor '{_shown(tensor.name)}' stands in it twice")
            seen.add(tensor.name)

    def _check_extents(self, tensors: tuple[GgufTensor, ...]) -> None:
        size = len(self.data)
        cut = sorted(
            (tensor for tensor in tensors if tensor.offset + tensor.bytes > size),
            key=lambda tensor: tensor.offset,
        )
        if cut:
            first = cut[0]
            others = f" (and {len(cut) - 1} more after it)" if len(cut) > 1 else ""
            raise ModelError(
                f"'{self.path}' is truncated: tensor '{_shown(first.name)}' ends at byte "
                f"{first.offset + first.bytes}, the file has {size}{others}",
                remedy="fetch the file again",
            )

    def _damaged(self, what: str) -> ModelError:
        return ModelError(f"'{self.path}' is damaged: {what}", remedy="fetch the file again")


def _shown(text: str) -> str:
    """A name from the file, short and printable enough for a message."""
    return (
        (text if len(text) <= _MAX_SHOWN_LENGTH else text[:_MAX_SHOWN_LENGTH] + "…")
        .encode("unicode_escape")
        .decode("ascii")
    )
