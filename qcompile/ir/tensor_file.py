"""Weights in a safetensors file: written one at a time, read lazily."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qcompile.errors import ArtifactError
from qcompile.ir.weights import Apply, Expression, Source, Stored, TensorSpec, WeightStore

_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_NARROW = (torch.float16, torch.bfloat16, torch.float32)
_ALIGNMENT = 64
_BLOCK_BYTES = 64 << 20


class TensorFile:
    """A safetensors file as a source of weights; a tensor is read when it is asked for.

    Args:
        path: The file.

    Raises:
        ArtifactError: If it cannot be read as safetensors.

    Attributes:
        identity: Its path.
    """

    def __init__(self, path: Path) -> None:
        self.identity = str(path)
        try:
            self._file: Any = safe_open(str(path), framework="pt").__enter__()
            self._specs = {name: self._spec(name) for name in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError) as error:
            raise ArtifactError(
                f"the weights {path} cannot be read: {error}",
                remedy="copy or compile the artifact again",
            ) from error

    def specs(self) -> Mapping[str, TensorSpec]:
        """Name to shape and dtype as stored."""
        return self._specs

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ArtifactError: If it cannot be read.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"'{name}' of {self.identity} cannot be read: {error}") from error
        return tensor

    def fingerprint(self) -> str:
        """A hash of names, shapes, size and time of change."""
        status = Path(self.identity).stat()
        described = f"{sorted(self._specs.items())}:{status.st_size}:{status.st_mtime_ns}"
        return hashlib.sha256(described.encode()).hexdigest()

    def _spec(self, name: str) -> TensorSpec:
        part = self._file.get_slice(name)
        return TensorSpec(tuple(part.get_shape()), _DTYPES[part.get_dtype()])


def write_tensors(
    weights: WeightStore, path: Path, *, advance: Callable[[str], None] | None = None
) -> dict[str, int]:
    """Writes all weights of a store; no two are in memory at once.

    A float weight that only moves elements of a narrower checkpoint is stored as the checkpoint
    has it.

    Args:
        weights: The store.
        path: The file to write.
        advance: Called with the name of each weight when it is written.

    Returns:
        Bytes stored for each weight.
    """
    layout, header = _layout(weights)
    with path.open("wb") as file:
        file.write(header)
        for name, spec in layout.items():
            floating = spec.dtype if spec.dtype.is_floating_point else None
            value = weights.materialize(name, floating).contiguous()
            content = value.reshape(-1).view(torch.uint8)
            for start in range(0, len(content), _BLOCK_BYTES):
                file.write(content[start : start + _BLOCK_BYTES].numpy().data)
            if advance is not None:
                advance(name)
    return {name: spec.bytes for name, spec in layout.items()}


def predict_size(weights: WeightStore) -> int:
    """Bytes of the file that `write_tensors` would write; no weight is read."""
    layout, header = _layout(weights)
    return len(header) + sum(spec.bytes for spec in layout.values())


def is_stored_as(stored: TensorSpec, visible: TensorSpec) -> bool:
    """Whether a stored tensor stands for a weight: the same, or the same in a narrower float."""
    narrower = (
        stored.dtype in _NARROW
        and visible.dtype.is_floating_point
        and stored.dtype.itemsize < visible.dtype.itemsize
    )
    return stored.shape == visible.shape and (narrower or stored.dtype == visible.dtype)


def _layout(weights: WeightStore) -> tuple[dict[str, TensorSpec], bytes]:
    """What is stored, in order, and the bytes before it."""
    specs = {name: TensorSpec(weights.spec(name).shape, _stored(weights, name)) for name in weights}
    # Wide elements first: every tensor is then aligned to its elements, without gaps.
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, spec in ordered.items():
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.bytes],
        }
        end += spec.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return ordered, len(text).to_bytes(8, "little") + text


def _stored(weights: WeightStore, name: str) -> torch.dtype:
    visible = weights.spec(name).dtype
    origin = _origin(weights.expression(name))
    narrower = (
        origin in _NARROW and visible.is_floating_point and origin.itemsize < visible.itemsize
    )
    return origin if origin is not None and narrower else visible


def _origin(expression: Expression) -> torch.dtype | None:
    """The one dtype of the tensors that an expression only moves elements of, or None."""
    match expression:
        case Source(checkpoint=checkpoint, name=name):
            return checkpoint.specs()[name].dtype
        case Stored(tensor=tensor):
            return tensor.dtype
        case Apply(operands=operands, exact=True):
            dtypes = {_origin(operand) for operand in operands}
            return dtypes.pop() if len(dtypes) == 1 else None
    return None
