"""Where a GGUF file keeps each weight, in which layout, and how its blocks are decoded."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.frontends.gguf_header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_ROTARY_ROWS = (".attn_q.", ".attn_k.")
_SUFFIXES = ("weight", "bias")
_CHUNK_ELEMENTS = 1 << 20  # decoded at a time, so that temporaries stay at a few megabytes
_F32 = 0
_F64 = 28


@dataclass(frozen=True)
class Layout:
    """How one file's tensors are found and put back into Hugging Face's layout.

    Attributes:
        header: The file's header.
        architecture: Its ``general.architecture``.
        name_map: The `gguf` package's table of names for this architecture.
        processor: What transformers does to this architecture's tensors (a `TensorProcessor`,
            which has no public type); None where they stand as they are, or for llama.
    """

    header: GgufHeader
    architecture: str
    name_map: Any
    processor: Any

    def file_names(self, names: list[str]) -> dict[str, tuple[str, ...]]:
        """Hugging Face name to the names in the file of the tensors that it is made of."""
        stored = {tensor.name for tensor in self.header.tensors}
        found: dict[str, list[str]] = {}
        for file_name, name in self._mapping(names).items():
            # Stacked experts have no suffix in Hugging Face's names, and one in the file.
            with_suffix = f"{file_name}.weight"
            stands_so = file_name in stored or with_suffix not in stored
            found.setdefault(name, []).append(file_name if stands_so else with_suffix)
        return {name: tuple(parts) for name, parts in found.items()}

    def restore(self, name: str, parts: tuple[GgufTensor, ...], data: ByteArray) -> Tensor:
        """The weight `name`, float32, made of `parts`; a view of `data` where stored so."""
        if self.processor is not None:
            return self._restore_by_transformers(name, parts, data)
        (part,) = parts
        rotary = self.architecture == "llama" and any(key in part.name for key in _ROTARY_ROWS)
        return torch.from_numpy(decode(data, part, self._rotary_order(part) if rotary else None))

    def _restore_by_transformers(
        self, name: str, parts: tuple[GgufTensor, ...], data: ByteArray
    ) -> Tensor:
        collected: dict[str, Any] = {"tensors": {}}
        mapping = self._mapping([name])
        restored: Tensor | None = None
        for part in parts:
            result = self.processor.process(
                weights=decode(data, part),
                name=part.name,
                tensor_key_mapping=mapping,
                parsed_parameters=collected,
            )
            if result.name is not None:
                restored = torch.from_numpy(np.ascontiguousarray(result.weights))
        restored = collected["tensors"].get(name, restored)
        if restored is None:
            raise ModelError(
                f"'{self.header.path}': transformers does not say how '{name}' is made of "
                f"{', '.join(part.name for part in parts)}",
                remedy="use the Hugging Face directory of the model",
            )
        return restored

    def _mapping(self, names: list[str]) -> dict[str, str]:
        """Name in the file to Hugging Face name: several to one for stacked experts."""
        mapping: dict[str, str] = {}
        for name in names:
            plain = name if self.processor is None else self.processor.preprocess_name(name)
            file_name = self._file_name(plain, mapping)
            if file_name is not None:
                mapping[file_name] = name
            elif self.processor is not None:
                stem, _, suffix = plain.rpartition(".")
                stem, suffix = (stem, f".{suffix}") if suffix in _SUFFIXES else (plain, "")
                self.processor.perform_fallback_tensor_mapping(mapping, suffix, "", stem)
        return mapping

    def _file_name(self, name: str, taken: dict[str, str]) -> str | None:
        # Some files were made from the bare decoder, whose names lack the first component.
        for candidate in (name, name.partition(".")[2]):
            found: str | None = self.name_map.get_name(
                candidate, try_suffixes=[f".{suffix}" for suffix in _SUFFIXES]
            )
            if found is not None and found not in taken:
                return found
        return None

    def _rotary_order(self, tensor: GgufTensor) -> npt.NDArray[np.intp]:
        """Where each stored row of llama's q or k goes.

        llama.cpp rotates the neighbouring rows (2i, 2i + 1) of a head of d rows, Hugging Face the
        rows (i, i + d/2).
        """
        heads = self.header.integer("llama.attention.head_count") or 0
        if ".attn_k." in tensor.name:
            heads = self.header.integer("llama.attention.head_count_kv") or heads
        rows = tensor.shape[0] if tensor.shape else 0
        if heads <= 0 or rows % (2 * heads):
            raise ModelError(
                f"'{self.header.path}': tensor '{tensor.name}' has {rows} rows, no multiple of "
                f"twice the {heads} heads that the metadata give",
                remedy="the file's metadata and tensors do not belong together; fetch it again",
            )
        halves = np.arange(rows, dtype=np.intp).reshape(heads, 2, rows // heads // 2)
        order: npt.NDArray[np.intp] = halves.swapaxes(1, 2).reshape(rows)
        return order


def layout_of(header: GgufHeader, architecture: str, config: PreTrainedConfig) -> Layout:
    """The layout of a file.

    Raises:
        ModelError: If the `gguf` package does not know the architecture.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise ModelError(
            f"'{header.path}' has the architecture '{architecture}', which the package 'gguf' "
            "does not know",
            remedy="update the package 'gguf', or use the Hugging Face directory of the model",
        )
    blocks = header.integer(f"{architecture}.block_count") or 0
    name_map = get_tensor_name_map(arch, blocks)
    return Layout(header, architecture, name_map, _processor(architecture, config))


def decode(
    data: ByteArray, tensor: GgufTensor, order: npt.NDArray[np.intp] | None = None
) -> FloatArray:
    """The values of a tensor in float32.

    Decodes a few megabytes at a time: the memory in use is the result, and little more. Float32
    data without an order are a view.

    Args:
        data: The whole file.
        tensor: Where it stands in it.
        order: Where row i goes: ``order[i]``; for a vector, element i.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = data[tensor.offset : tensor.offset + tensor.bytes]
    if tensor.type_id == _F32 and order is None:
        aligned = np.require(raw.view(np.float32), requirements="A")
        return np.asarray(aligned).reshape(tensor.shape)
    values = np.empty(tensor.shape, np.float32)
    if values.size == 0:
        return values
    if values.ndim == 1 and order is not None:
        values[order] = decode(data, tensor)
        return values
    kind = GGMLQuantizationType(tensor.type_id)
    rows = values.reshape(-1, tensor.shape[-1] if tensor.shape else 1)
    stored = raw.reshape(rows.shape[0], -1)
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        chunk = np.asarray(stored[start : start + step])
        where = slice(start, start + step) if order is None else order[start : start + step]
        rows[where] = chunk.view(np.float64) if kind == _F64 else dequantize(chunk, kind)
    return values


def check_decodable(tensors: list[GgufTensor], header: GgufHeader) -> None:
    """Refuses what `gguf` cannot decode before any work is done, naming the tensor.

    Raises:
        ModelError: If a tensor's type has no decoder.
    """
    first_of_type = {tensor.type_id: tensor for tensor in reversed(tensors)}
    for type_id, tensor in first_of_type.items():
        if not _has_decoder(type_id):
            from gguf import GGMLQuantizationType

            raise ModelError(
                f"'{header.path}': tensor '{tensor.name}' is stored as "
                f"{GGMLQuantizationType(type_id).name}, which the package 'gguf' cannot decode",
                remedy="use a file in another format, such as Q8_0, F16 or Q4_K_M",
            )


def _has_decoder(type_id: int) -> bool:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if type_id == _F64:
        return True
    kind = GGMLQuantizationType(type_id)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _processor(architecture: str, config: PreTrainedConfig) -> Any:
    if architecture == "llama":  # done here, without holding a tensor twice
        return None
    tables = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    processor_class = tables.TENSOR_PROCESSORS.get(architecture)
    return None if processor_class is None else processor_class(config=config.to_dict())
