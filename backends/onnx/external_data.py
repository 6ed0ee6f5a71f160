"""Writes a model and, beside it, its weights: one tensor in memory at a time.

Offsets are aligned so that a run time can map the file and use the weights where they are: to a
cache line, and to a page for tensors of more than a mebibyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from qcompile.atomic_directory import is_full_disk
from qcompile.backends.onnx.emitter import OnnxGraph
from qcompile.backends.onnx.values import WeightTensor
from qcompile.errors import ArtifactError
from qcompile.ir.weights import WeightStore
from qcompile.progress import NullProgress, Progress

MODEL_NAME = "model.onnx"

_INLINE_BYTES = 1 << 10
_LINE = 64
_PAGE = 4096
_PAGED_BYTES = 1 << 20
_BLOCK_BYTES = 16 << 20


def write_model(
    graph: OnnxGraph,
    weights: WeightStore,
    directory: Path,
    *,
    name: str = MODEL_NAME,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes ``<name>`` and, if any tensor is 1 KiB or more, ``<name>.data``.

    Args:
        graph: The model.
        weights: The store of the program that it was emitted from.
        directory: Exists; files of these names are overwritten.
        name: File name of the model.
        progress: Told of every initializer.

    Returns:
        Bytes of every initializer, by its name.

    Raises:
        ArtifactError: If the files cannot be written.
        OSError: If the disk is full.
        ModelError: If a weight cannot be read.
    """
    path, data = directory / name, directory / f"{name}.data"
    try:
        with data.open("wb") as file:
            stored = _write_initializers(graph, weights, file, data.name, progress)
        if data.stat().st_size == 0:
            data.unlink()
        path.write_bytes(_serialize(graph))
    except OSError as error:
        if is_full_disk(error):  # who made the directory knows how much it needs
            raise
        raise ArtifactError(
            f"cannot write {path}: {error.strerror or error}",
            remedy="choose another output directory",
        ) from error
    return stored


def predict_sizes(graph: OnnxGraph, *, name: str = MODEL_NAME) -> dict[str, int]:
    """Bytes of the files that `write_model` would write, by file name; no weight is read.

    Args:
        graph: The model; it is not to be used for anything else afterwards.
        name: File name of the model.
    """
    data, end = f"{name}.data", 0
    for key, value in graph.model.graph.initializers.items():
        weight = graph.weights.get(key)
        if weight is None:
            continue
        if weight.spec.bytes < _INLINE_BYTES:
            zeros = torch.zeros(weight.spec.shape, dtype=weight.spec.dtype)
            value.const_value = _inline(zeros, value)
            continue
        offset = _aligned(end, weight.spec.bytes)
        end = offset + weight.spec.bytes
        value.const_value = _external(value, data, offset, weight.spec.bytes)
    sizes = {name: len(_serialize(graph)), data: end}
    return {file: size for file, size in sizes.items() if size}


def to_bytes(graph: OnnxGraph, weights: WeightStore) -> bytes:
    """A small model with all weights inside, as ONNX Runtime reads it.

    Raises:
        ArtifactError: If it passes the 2 GiB that one message may have.
    """
    total = sum(weight.spec.bytes for weight in graph.weights.values())
    if total >= 2**31:
        raise ArtifactError(
            f"weights of {total} bytes do not fit into one file", remedy="write them beside it"
        )
    for value in graph.model.graph.initializers.values():
        if weight := graph.weights.get(str(value.name)):
            value.const_value = _inline(_read(weights, weight), value)
    return _serialize(graph)


def _write_initializers(
    graph: OnnxGraph,
    weights: WeightStore,
    file: BinaryIO,
    location: str,
    progress: Progress | None,
) -> dict[str, int]:
    listener = progress or NullProgress()
    initializers = graph.model.graph.initializers
    listener.stage("write weights", len(initializers))
    stored: dict[str, int] = {}
    for name, value in initializers.items():
        weight = graph.weights.get(name)
        if weight is None:
            assert value.const_value is not None  # constants have theirs from the start
            stored[name] = value.const_value.nbytes
        else:
            stored[name] = weight.spec.bytes
            value.const_value = _store(_read(weights, weight), value, file, location)
        listener.advance(1, name)
    return stored


def _read(weights: WeightStore, weight: WeightTensor) -> Tensor:
    """The tensor of the model; it may be a view with strides."""
    tensor = weights.materialize(weight.weight)
    if weight.arrange is not None:
        tensor = weight.arrange(tensor)
    tensor = tensor.detach().to("cpu", weight.spec.dtype)
    if tuple(tensor.shape) != weight.spec.shape:
        raise AssertionError(
            f"weight '{weight.weight}' was arranged to {list(tensor.shape)}, "
            f"the model has {list(weight.spec.shape)}"
        )
    return tensor


def _store(tensor: Tensor, value: ir.Value, file: BinaryIO, location: str) -> ir.TensorProtocol:
    length = tensor.nbytes
    if length < _INLINE_BYTES:
        return _inline(tensor, value)
    offset = _aligned(file.tell(), length)
    file.write(b"\0" * (offset - file.tell()))
    for block in _blocks(tensor):
        file.write(_raw(block).data)
    return _external(value, location, offset, length)


def _aligned(position: int, length: int) -> int:
    """Where a tensor may begin, at or after a position."""
    alignment = _PAGE if length > _PAGED_BYTES else _LINE
    return position + -position % alignment


def _external(value: ir.Value, location: str, offset: int, length: int) -> ir.ExternalTensor:
    assert value.dtype is not None
    assert value.shape is not None
    return ir.ExternalTensor(
        location, offset, length, value.dtype, shape=value.shape, name=str(value.name)
    )


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Runs of rows small enough that copying one out of a strided view costs no memory to speak
    of.
    """
    if tensor.dim() == 0 or tensor.is_contiguous():
        yield tensor
        return
    rows = max(1, _BLOCK_BYTES // max(1, tensor[0].nbytes))
    for start in range(0, tensor.shape[0], rows):
        yield tensor[start : start + rows]


def _raw(tensor: Tensor) -> npt.NDArray[np.uint8]:
    # NumPy lacks some types (bfloat16), so it sees bytes.
    raw: npt.NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw


def _inline(tensor: Tensor, value: ir.Value) -> ir.TensorProtocol:
    assert value.dtype is not None
    assert value.shape is not None
    raw = np.frombuffer(_raw(tensor).tobytes(), np.uint8)
    if value.dtype.itemsize < 1:
        return ir.PackedTensor(raw, value.dtype, shape=value.shape, name=str(value.name))
    numbers = raw.view(value.dtype.numpy()).reshape(tuple(tensor.shape))
    return ir.Tensor(numbers, dtype=value.dtype, name=str(value.name))


def _serialize(graph: OnnxGraph) -> bytes:
    serialized: bytes = ir.to_proto(graph.model).SerializeToString()
    return serialized
