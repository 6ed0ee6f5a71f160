"""Safetensors checkpoints: validated when opened, read lazily, one tensor at a time.

`open_checkpoint` finds the weights of a Hugging Face directory, checks every header against the
size of its file, and returns a source whose tensors are views of the memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.ir.weights import TensorSpec

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_MAX_INDEX_BYTES = 100_000_000
_SAMPLES = 64
_SAMPLE_BYTES = 4096

# Names of the safetensors format. Sub-byte types (F4, F6) have no torch dtype of one element each.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_checkpoint(directory: Path) -> SafetensorsSource:
    """Opens the safetensors weights of a model directory.

    Looks for ``model.safetensors``, then for an index of shards, then for one other
    ``.safetensors`` file. All headers are validated; no tensor is read.

    Args:
        directory: A directory as written by `save_pretrained`.

    Raises:
        ModelError: If there are no such weights, a shard is missing, or a file is truncated or
            damaged; names the file, and the tensor where one is at fault. Pickle files are
            refused: loading one can run code.
    """
    if not directory.is_dir():
        problem = "is a file, not a directory" if directory.exists() else "does not exist"
        raise ModelError(
            f"model directory '{directory}' {problem}",
            remedy="give a directory that save_pretrained wrote, or a .gguf file",
        )
    if (directory / _SINGLE).is_file():
        return SafetensorsSource(directory, [_SINGLE])
    index = _find_index(directory)
    if index is not None:
        return _open_sharded(directory, index)
    return SafetensorsSource(directory, [_find_only_file(directory)])


class SafetensorsSource:
    """A `TensorSource` over one or more safetensors files of a directory.

    Args:
        directory: Where the files are.
        files: Their names, relative to it.

    Attributes:
        identity: The path of the file, or of the directory with the number of shards.

    Raises:
        ModelError: If a file is missing, truncated or damaged, or two hold the same tensor.
    """

    def __init__(self, directory: Path, files: Iterable[str]) -> None:
        names = list(files)
        self.identity = (
            str(directory / names[0]) if len(names) == 1 else f"{directory} ({len(names)} shards)"
        )
        self._directory = directory
        self._shards = {name: read_safetensors_header(directory / name) for name in names}
        self._file_of = self._locate()
        self._open: dict[str, Any] = {}  # safetensors has no type for its handle

    def specs(self) -> Mapping[str, TensorSpec]:
        """Name to shape and dtype, from the headers."""
        return {
            name: self._shards[file].specs[name] for name, file in sorted(self._file_of.items())
        }

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, backed by the mapped file; not to be written to.

        Raises:
            ModelError: If there is no such tensor, or its file changed under us.
        """
        if name not in self._file_of:
            raise ModelError(f"the checkpoint '{self.identity}' has no tensor '{name}'")
        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self._directory / file, framework="pt")
            tensor: Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"cannot read tensor '{name}' of '{self._directory / file}': {error}",
                remedy="check that the file was not changed or removed meanwhile",
            ) from error
        return tensor

    def fingerprint(self) -> str:
        """Hash over file names, sizes, headers and samples of the data."""
        return fingerprint_files(
            (name, self._directory / name, shard.bytes) for name, shard in self._shards.items()
        )

    def _locate(self) -> dict[str, str]:
        located: dict[str, str] = {}
        for file, shard in self._shards.items():
            for name in shard.specs:
                if name in located:
                    raise ModelError(
                        f"tensor '{name}' is in '{located[name]}' and in '{file}' of "
                        f"'{self._directory}'",
                        remedy="keep one of the two files' copies; save_pretrained writes one",
                    )
                located[name] = file
        return located


def fingerprint_files(files: Iterable[tuple[str, Path, int]]) -> str:
    """A hash that tells two checkpoints apart without reading all of them.

    Headers of two fine-tuned models are often equal byte for byte, so a few kilobytes of data,
    taken at even distances, count as well.

    Args:
        files: (name to hash, path, size of the header in bytes), in any order.

    Returns:
        Hexadecimal sha256 over names, sizes, headers and samples.
    """
    digest = hashlib.sha256()
    for name, path, header_bytes in sorted(files):
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0{header_bytes}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(header_bytes))
            step = max((size - header_bytes) // _SAMPLES, _SAMPLE_BYTES)
            for offset in range(header_bytes, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class SafetensorsHeader:
    """A validated header: what a file holds, and how many bytes the header takes."""

    specs: Mapping[str, TensorSpec]
    bytes: int


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Reads and validates the header of one safetensors file.

    Allocates no more than the file's own size justifies, whatever the header says.

    Raises:
        ModelError: If the file is missing, truncated, or its header is damaged.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            _check_header_length(path, length, size)
            raw = file.read(length)
    except OSError as error:
        raise ModelError(
            f"cannot read the weights '{path}': {error.strerror or error}",
            remedy="check the path and its permissions, or fetch the model again",
        ) from error
    entries = _parse_object(path, raw, "its header")
    entries.pop("__metadata__", None)
    extents = {name: _check_entry(path, name, entry) for name, entry in entries.items()}
    _check_extents(path, extents, available=size - _LENGTH_BYTES - length)
    specs = {name: extent.spec for name, extent in extents.items()}
    return SafetensorsHeader(specs, _LENGTH_BYTES + length)


@dataclass(frozen=True)
class _Extent:
    spec: TensorSpec
    begin: int
    end: int


def _check_header_length(path: Path, length: int, size: int) -> None:
    if size < _LENGTH_BYTES:
        raise _truncated(path, f"it has {size} bytes, too few for a header")
    if length > _MAX_HEADER_BYTES:
        raise _damaged(path, f"its header claims {length} bytes, the format allows 100 MB")
    if _LENGTH_BYTES + length > size:
        raise _truncated(path, f"its header claims {length} bytes, the file has {size}")


def _check_entry(path: Path, name: str, entry: object) -> _Extent:
    if not _is_text(name):
        raise _damaged(path, f"{name!r} is no valid tensor name")
    if not isinstance(entry, dict):
        raise _damaged(path, f"the description of tensor '{name}' is no object")
    dtype_name, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not _are_sizes(shape):
        raise _damaged(path, f"tensor '{name}' has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor '{name}' has no valid data_offsets")
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise ModelError(
            f"'{path}': tensor '{name}' has the dtype {dtype_name!r}, which cannot be read",
            remedy="store the model as F32, F16 or BF16 safetensors",
        )
    spec = TensorSpec(tuple(shape), _DTYPES[dtype_name])
    begin, end = offsets
    needed = prod(shape) * spec.dtype.itemsize
    if end - begin != needed:
        raise _damaged(
            path,
            f"tensor '{name}' of shape {shape} and type {dtype_name} needs {needed} bytes, its "
            f"data_offsets {offsets} give {end - begin}",
        )
    return _Extent(spec, begin, end)


def _check_extents(path: Path, extents: Mapping[str, _Extent], available: int) -> None:
    """The data of the tensors has to fill the rest of the file, without gap or overlap."""
    position = 0
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].begin, item[1].end)):
        if extent.begin != position:
            relation = "overlaps the tensor before it" if extent.begin < position else "has a gap"
            raise _damaged(path, f"the data of tensor '{name}' {relation}")
        if extent.end > available:
            raise _truncated(
                path,
                f"tensor '{name}' ends at byte {extent.end} of the data, the file has {available}",
            )
        position = extent.end
    if position != available:
        raise _damaged(path, f"{available - position} bytes follow its last tensor")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # JSON can spell a lone surrogate, UTF-8 cannot
        return False
    return True


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    )


def _find_index(directory: Path) -> Path | None:
    if (directory / _INDEX).is_file():
        return directory / _INDEX
    found = sorted(directory.glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise ModelError(
            f"'{directory}' has several safetensors indices: {_listed(found)}",
            remedy=f"keep one of them, or rename it to {_INDEX}",
        )
    return found[0] if found else None


def _open_sharded(directory: Path, index: Path) -> SafetensorsSource:
    weight_map = _read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise ModelError(
            f"{_listed(missing)} is named in '{index}', but is not in '{directory}'",
            remedy="fetch the missing shards",
        )
    source = SafetensorsSource(directory, shards)
    specs = source.specs()
    absent = [name for name in weight_map if name not in specs]
    if absent:
        raise ModelError(
            f"'{index}' names tensor '{absent[0]}' in '{weight_map[absent[0]]}', which does not "
            f"hold it ({len(absent)} such)",
            remedy="fetch the model again: index and shards do not belong together",
        )
    return source


def _read_weight_map(index: Path) -> dict[str, str]:
    size = index.stat().st_size
    if size > _MAX_INDEX_BYTES:
        raise ModelError(f"the index '{index}' has {size} bytes, more than any model needs")
    weight_map = _parse_object(index, index.read_bytes(), "it").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "it has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _stays_inside(shard):
            raise _damaged(index, f"tensor '{name}' is mapped to {shard!r}, no file beside it")
    return weight_map


def _stays_inside(name: str) -> bool:
    """Whether a relative file name leads below its directory, on POSIX and on Windows."""
    path = PurePosixPath(name.replace("\\", "/"))
    return (
        bool(name)
        and "\0" not in name
        and ":" not in name
        and not path.is_absolute()
        and ".." not in path.parts
    )


def _find_only_file(directory: Path) -> str:
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1 and found[0].name == _ADAPTER:
        raise ModelError(
            f"'{directory}' holds a LoRA adapter, not a model",
            remedy="merge it into its base model (peft: merge_and_unload, save_pretrained)",
        )
    if len(found) == 1:
        return found[0].name
    if found:
        raise ModelError(
            f"'{directory}' has several .safetensors files and no index: {_listed(found)}",
            remedy=f"write an index ({_INDEX}), or leave one file",
        )
    pickles = sorted(path for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelError(
            f"'{directory}' has only pickled weights ({_listed(pickles)}), which are never "
            "unpickled: loading them can run any code",
            remedy="convert the model to safetensors with save_pretrained, where you trust it",
        )
    raise ModelError(
        f"'{directory}' has no weights: neither {_SINGLE} nor {_INDEX}",
        remedy="give a directory that save_pretrained wrote, or a .gguf file",
    )


def _parse_object(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        for key, value in pairs:
            if key in parsed:
                raise _damaged(path, f"'{key}' stands in {what} twice")
            parsed[key] = value
        return parsed

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, huge ints
        raise _damaged(path, f"{what} is no valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise _damaged(path, f"{what} is no JSON object")
    return parsed


def _listed(paths: list[Path] | list[str]) -> str:
    names = [path.name if isinstance(path, Path) else path for path in paths]
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _damaged(path: Path, what: str) -> ModelError:
    return ModelError(f"'{path}' is damaged: {what}", remedy="fetch the file again")


def _truncated(path: Path, what: str) -> ModelError:
    return ModelError(f"'{path}' is truncated: {what}", remedy="fetch the file again")
