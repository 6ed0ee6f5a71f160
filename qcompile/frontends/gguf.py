"""GGUF files as models: config, tokenizer, and weights under their Hugging Face names.

The file's header is checked by `gguf_header`, block formats are decoded by the `gguf` package, and
the config and tokenizer come from transformers, completed by `gguf_config`. What is stored in a
layout of llama.cpp's own (rotary rows interleaved, norms offset by one) is put back when read.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qcompile.errors import MissingExtraError, ModelError
from qcompile.frontends.checkpoint import fingerprint_files
from qcompile.frontends.config import library_failures
from qcompile.frontends.gguf_config import ROPE_FACTORS, build_config
from qcompile.frontends.gguf_header import GgufTensor, read_header
from qcompile.frontends.gguf_layout import Layout, check_decodable, decode, layout_of
from qcompile.ir.weights import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_EMBEDDING = "token_embd.weight"
_OUTPUT = "output.weight"


class GgufModel:
    """A model in a GGUF file.

    Args:
        path: The file.

    Attributes:
        path: The file.
        header: Its validated header.
        architecture: llama.cpp's name of it, such as ``"llama"`` or ``"qwen2"``.

    Raises:
        MissingExtraError: If the `gguf` package is absent.
        ModelError: If the file is missing, truncated or damaged, or one of several splits.
    """

    def __init__(self, path: Path) -> None:
        require_gguf()
        from gguf import GGML_QUANT_SIZES

        self.path = path
        self.header = read_header(
            path, {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        )
        architecture = self.header.value("general.architecture")
        if not isinstance(architecture, str):
            raise ModelError(
                f"'{path}' does not name its architecture ('general.architecture')",
                remedy="convert the model again with a recent llama.cpp",
            )
        self.architecture = architecture
        if (self.header.integer("split.count") or 1) > 1:
            raise ModelError(
                f"'{path}' is one of several splits of a model",
                remedy="merge them with llama.cpp: llama-gguf-split --merge FIRST OUTPUT",
            )

    @property
    def stored_bytes(self) -> int:
        """Bytes that the tensors take in the file, quantized as they are."""
        return sum(tensor.bytes for tensor in self.header.tensors)

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template that the file carries."""
        template = self.header.value("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def config(self) -> PreTrainedConfig:
        """The Hugging Face configuration of the model; a fresh copy at each call.

        Raises:
            MissingExtraError: If transformers is absent.
            ModelError: If the architecture or what the metadata say cannot be represented.
        """
        return copy.deepcopy(self._config)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the file carries, chat template included.

        Raises:
            MissingExtraError: If transformers is absent.
            ModelError: If there is none, or transformers cannot build it.
        """
        _require("transformers", "read a tokenizer from a GGUF file")
        from transformers import PreTrainedTokenizerFast

        try:
            # Not AutoTokenizer: it would parse the whole vocabulary again to find a class whose
            # backend is then taken from the file all the same (4 s for 49,152 tokens; this: 0.3 s).
            tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
                str(self.path.parent), gguf_file=self.path.name, local_files_only=True
            )
        except Exception as error:
            # The tokenizers library raises the bare class for vocabularies that make no sense.
            if type(error) is Exception or isinstance(error, library_failures()):
                raise ModelError(
                    f"transformers cannot build the tokenizer of '{self.path}': {error}",
                    remedy="use the Hugging Face directory of the model",
                ) from error
            raise
        return tokenizer

    def source(self, expected: Mapping[str, TensorSpec]) -> GgufSource:
        """The weights under their Hugging Face names, read and decoded one at a time.

        Args:
            expected: The state dict of the model that `config` describes: Hugging Face name to
                shape. A tied ``lm_head.weight`` may be in it or not.

        Returns:
            A source with exactly the names in `expected`, all float32.

        Raises:
            ModelError: If a tensor of the file belongs to no name in `expected` or the other way
                round, if shapes differ, or if a block format cannot be decoded.
        """
        return GgufSource(self, expected)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        _require("transformers", "read the configuration of a GGUF file")
        return build_config(self.header, self.architecture, self._decode_whole)

    def _decode_whole(self, tensor: GgufTensor) -> npt.NDArray[np.float32]:
        return decode(np.memmap(self.path, mode="c"), tensor)


class GgufSource:
    """A `TensorSource` over a GGUF file; made by `GgufModel.source`.

    Attributes:
        identity: The path of the file.
    """

    def __init__(self, model: GgufModel, expected: Mapping[str, TensorSpec]) -> None:
        self.identity = str(model.path)
        self._header = model.header
        self._layout: Layout = layout_of(model.header, model.architecture, model.config())
        self._specs = {
            name: TensorSpec(spec.shape, torch.float32) for name, spec in expected.items()
        }
        self._parts = self._match(model.architecture, tied=model.config().tie_word_embeddings)
        check_decodable([part for parts in self._parts.values() for part in parts], self._header)
        # Copy-on-write: torch asks for writable memory, the file stays as it is in any case.
        self._data: npt.NDArray[np.uint8] = np.memmap(model.path, mode="c")

    def specs(self) -> Mapping[str, TensorSpec]:
        """Hugging Face name to shape; all float32."""
        return dict(self._specs)

    def read(self, name: str) -> Tensor:
        """One tensor, decoded to float32; a view of the file where it is stored so.

        Raises:
            ModelError: If there is no such tensor, or its shape is not the expected one.
        """
        if name not in self._specs:
            raise ModelError(f"'{self.identity}' has no tensor for '{name}'")
        tensor = self._layout.restore(name, self._parts[name], self._data)
        if tuple(tensor.shape) != self._specs[name].shape:
            raise self._misshapen(name, tuple(tensor.shape))
        return tensor

    def fingerprint(self) -> str:
        """Hash over the file's name, size, header and samples of its data."""
        path = self._header.path
        return fingerprint_files([(path.name, path, self._header.bytes)])

    def _match(self, architecture: str, *, tied: bool) -> dict[str, tuple[GgufTensor, ...]]:
        """Hugging Face name to the tensors of the file that it is made of."""
        tensors = {tensor.name: tensor for tensor in self._header.tensors}
        names = self._layout.file_names(list(self._specs))
        if tied:  # llama.cpp takes the embedding for the output as well
            untold = [name for name in self._specs if names.get(name, (_OUTPUT,)) == (_OUTPUT,)]
            names.update(dict.fromkeys(untold[:1], (_EMBEDDING,)))
        missing = [name for name in self._specs if not set(names.get(name, ("",))) <= set(tensors)]
        if missing:
            raise ModelError(
                f"'{self.identity}' (architecture {architecture}) has no tensor for "
                f"{_listed(missing)}",
                remedy="use the Hugging Face directory of the model",
            )
        used = {part for parts in names.values() for part in parts}
        unused = [name for name in tensors if name not in used and not _is_constant(name)]
        if unused:
            raise ModelError(
                f"'{self.identity}' (architecture {architecture}) has tensors that belong to no "
                f"weight of the model: {_listed(unused)}",
                remedy="use the Hugging Face directory of the model",
            )
        matched = {name: tuple(tensors[part] for part in parts) for name, parts in names.items()}
        for name, parts in matched.items():
            if sum(int(np.prod(part.shape)) for part in parts) != self._specs[name].elements:
                raise self._misshapen(name, parts[0].shape)
        return matched

    def _misshapen(self, name: str, shape: tuple[int, ...]) -> ModelError:
        return ModelError(
            f"'{self.identity}': '{name}' has shape {list(shape)}, the model needs "
            f"{list(self._specs[name].shape)}",
            remedy="the file's metadata and tensors do not belong together; fetch it again",
        )


def require_gguf() -> None:
    """Checks that the `gguf` package is there.

    Raises:
        MissingExtraError: If it is not.
    """
    _require("gguf", "read a GGUF file")


def _require(package: str, purpose: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, extra="gguf", purpose=purpose)


def _is_constant(name: str) -> bool:
    """Whether a tensor of the file is a table that the config determines, not a weight."""
    return name == ROPE_FACTORS or name.endswith((".attn_rot_embd.weight", ".rope_freqs.weight"))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
