"""The Hugging Face configuration of a GGUF file.

transformers reads the metadata; here is added what its tables leave out although the file says
it: sizes that the tensors prove, biases, and the scaling of rotary frequencies.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qcompile.errors import ModelError
from qcompile.frontends.config import library_failures
from qcompile.frontends.gguf_header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FloatArray = npt.NDArray[np.float32]

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp divides the rotary frequencies (Llama 3.1 and later)."""

_METADATA_ONLY = "metadata.gguf"
_MAX_LAYERS = 100_000

# Llama 3's scaling (transformers: rope_type "llama3"); the file holds only what results from it.
_LLAMA3_LOW = 1.0
_LLAMA3_HIGH = 4.0
_LLAMA3_CONTEXT = 8192


def build_config(
    header: GgufHeader, architecture: str, decode: Callable[[GgufTensor], FloatArray]
) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file.

    Args:
        header: The validated header.
        architecture: Its ``general.architecture``.
        decode: Reads a tensor of the file, in float32.

    Raises:
        ModelError: If transformers does not know the architecture, or the metadata ask for
            something that its configuration cannot say.
    """
    blocks = header.integer(f"{architecture}.block_count")
    if blocks is not None and blocks > min(len(header.tensors), _MAX_LAYERS):
        raise ModelError(
            f"'{header.path}' claims {blocks} blocks, and has {len(header.tensors)} tensors",
            remedy="fetch the file again",
        )
    config = _read_by_transformers(header, architecture)
    config.name_or_path = str(header.path)
    _add_sizes(config, header)
    _add_biases(config, header)
    if architecture == "llama" and hasattr(config, "sliding_window"):
        # Named "mistral", read as such: the default window of that class is not in the file.
        config.sliding_window = header.integer("llama.attention.sliding_window")
    _add_rope_scaling(config, header, architecture)
    _add_rope_factors(config, header, decode)
    return config


def _read_by_transformers(header: GgufHeader, architecture: str) -> PreTrainedConfig:
    """What transformers makes of the metadata, given a copy of them without the vocabulary.

    Its reader takes 2 to 3 s for a vocabulary of 49,152 tokens, of which the configuration needs
    only the number.
    """
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="qcompile-gguf-") as directory:
        try:
            _write_metadata(header, architecture, Path(directory) / _METADATA_ONLY)
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                directory, gguf_file=_METADATA_ONLY, local_files_only=True
            )
        except library_failures() as error:
            raise ModelError(
                f"transformers cannot configure the architecture '{architecture}' from the "
                f"metadata of '{header.path}': {error}",
                remedy="use the Hugging Face directory of the model",
            ) from error
    return config


def _write_metadata(header: GgufHeader, architecture: str, path: Path) -> None:
    from gguf import GGUFWriter

    logging.getLogger("gguf.gguf_writer").setLevel(logging.WARNING)
    writer = GGUFWriter(path, architecture)
    for key, value in header.metadata.items():
        if key in ("general.architecture", "general.alignment"):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_int64(key, value) if value < 0 else writer.add_uint64(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        elif key != "tokenizer.chat_template":
            writer.add_string(key, value)
    vocabulary = header.arrays.get("tokenizer.ggml.tokens")
    size_key = f"{architecture}.vocab_size"
    if vocabulary is not None and size_key not in header.metadata:
        writer.add_uint64(size_key, vocabulary[1])
    for key, (_, count, _) in header.arrays.items():
        if count and not key.startswith("tokenizer."):
            values = header.value(key)
            assert isinstance(values, list)
            writer.add_array(key, values)
    for tensor in header.tensors:  # only the names matter: they tell tied from untied
        writer.add_tensor(tensor.name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Vocabulary and head size as the tensors have them."""
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    embedding = shapes.get("token_embd.weight")
    if embedding:
        config.vocab_size = embedding[0]
    query_rows = {shape[0] for name, shape in shapes.items() if name.endswith(".attn_q.weight")}
    heads = getattr(config, "num_attention_heads", None)
    if not hasattr(config, "head_dim") or not isinstance(heads, int) or len(query_rows) != 1:
        return
    rows = query_rows.pop()
    if heads <= 0 or rows % heads:
        raise ModelError(
            f"'{header.path}': {rows} rows of 'attn_q' do not divide into {heads} heads",
            remedy="the file's metadata and tensors do not belong together; fetch it again",
        )
    config.head_dim = rows // heads


def _add_biases(config: PreTrainedConfig, header: GgufHeader) -> None:
    names = {tensor.name for tensor in header.tensors}
    for option, tensor in (("attention_bias", "attn_q.bias"), ("mlp_bias", "ffn_up.bias")):
        if hasattr(config, option):
            setattr(config, option, f"blk.0.{tensor}" in names)


def _add_rope_scaling(config: PreTrainedConfig, header: GgufHeader, architecture: str) -> None:
    kind = header.value(f"{architecture}.rope.scaling.type")
    factor = header.value(f"{architecture}.rope.scaling.factor")
    if kind in (None, "none") or factor in (None, 0.0, 1.0):
        return
    if kind not in ("linear", "yarn") or not isinstance(factor, (int, float)):
        raise ModelError(
            f"'{header.path}' scales its rotary embedding by '{kind}', which cannot be taken over",
            remedy="use the Hugging Face directory of the model",
        )
    scaling: dict[str, object] = {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        original = header.integer(f"{architecture}.rope.scaling.original_context_length")
        if original is None:
            raise ModelError(
                f"'{header.path}' scales its rotary embedding by 'yarn' and does not say from "
                "which context length",
                remedy="use the Hugging Face directory of the model",
            )
        scaling["original_max_position_embeddings"] = original
    _set_rope(config, header, scaling)


def _add_rope_factors(
    config: PreTrainedConfig, header: GgufHeader, decode: Callable[[GgufTensor], FloatArray]
) -> None:
    """Recognizes Llama 3's scaling in the table of factors that the file has instead of it."""
    tensor = next((item for item in header.tensors if item.name == ROPE_FACTORS), None)
    if tensor is None:
        return
    factors = decode(tensor).astype(np.float64).reshape(-1)
    if np.all(factors == 1.0):
        return
    factor = float(factors.max()) if factors.size else 1.0
    rope = getattr(config, "rope_parameters", None) or {}
    wanted = _llama3_factors(float(rope.get("rope_theta", 0.0)), factor, factors.size)
    # The converter computes in float32 or float64, by version: 1e-4 separates neither, but does
    # separate other parameters of the scaling, the least of which move a factor by per cents.
    if wanted is None or not np.allclose(factors, wanted, rtol=1e-4):
        raise ModelError(
            f"'{header.path}' scales its rotary frequencies ('{ROPE_FACTORS}') in a way that is "
            "not Llama 3's",
            remedy="use the Hugging Face directory of the model",
        )
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    _set_rope(config, header, scaling)


def _llama3_factors(theta: float, factor: float, count: int) -> npt.NDArray[np.float64] | None:
    """Divisors of the rotary frequencies: 1 for short waves, `factor` for long, smooth between."""
    if theta <= 0 or not np.isfinite(factor) or factor <= 0:
        return None
    wave_lengths = 2 * np.pi * theta ** (np.arange(count) / count)
    smooth = (_LLAMA3_CONTEXT / wave_lengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    smooth = np.clip(smooth, 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))


def _set_rope(config: PreTrainedConfig, header: GgufHeader, scaling: dict[str, object]) -> None:
    present = getattr(config, "rope_parameters", None)
    if not isinstance(present, dict):
        raise ModelError(
            f"'{header.path}' scales its rotary embedding, for which the configuration of this "
            "architecture has no place",
            remedy="use the Hugging Face directory of the model",
        )
    config.rope_parameters = {**present, **scaling}
