"""Checkpoints that are quantized already: what they are, and their weights as floats on request.

qcompile starts from float weights: quantizing what was quantized before adds a second error. So
such a checkpoint is refused, by name, unless the caller asks to dequantize it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.frontends.packed.layers import Stated
from qcompile.frontends.packed.weights import find_packed_weights
from qcompile.ir.weights import TensorSource, TensorSpec

_TITLES = {
    "gptq": "a GPTQ",
    "awq": "an AWQ",
    "bitsandbytes": "a bitsandbytes",
    "compressed-tensors": "a compressed-tensors",
    "fp8": "an FP8",
}
_READABLE_FORMATS = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm",),
    "bitsandbytes": ("nf4", "fp4", "int8"),
    "compressed-tensors": (
        "pack-quantized",
        "int-quantized",
        "float-quantized",
        "naive-quantized",
        "dense",
    ),
    "fp8": ("fp8",),
}


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """How the weights of a checkpoint are quantized, as its config says.

    Attributes:
        method: ``"gptq"``, ``"awq"``, ``"compressed-tensors"``, ``"bitsandbytes"``, ``"fp8"``, or
            another method's own name.
        format: The variant of the layout, such as ``"gptq_v2"``, ``"gemm"`` or ``"nf4"``.
        bits: Bits of a code; None if the config does not say, or groups of layers differ.
        group_size: Inputs that share a scale; 0 for one scale per channel; None if not stated.
        symmetric: Whether there are no zero points; None if not stated.
        ignored: Names or patterns of modules that are not quantized.
        activations: What activations are quantized to, such as ``"int8"``; None for nothing.
        block: (rows, columns) that share a scale, for formats that scale by blocks.
    """

    method: str
    format: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    ignored: tuple[str, ...] = ()
    activations: str | None = None
    block: tuple[int, int] | None = None

    @property
    def readable(self) -> bool:
        """Whether `DequantizedSource` knows this layout."""
        return self.format in _READABLE_FORMATS.get(self.method, ())

    def __str__(self) -> str:
        title = _TITLES.get(self.method, f"a '{self.method}'")
        parts = [] if self.bits is None else [f"{self.bits}-bit weights"]
        if self.block is not None:
            parts.append(f"blocks of {self.block[0]} x {self.block[1]}")
        elif self.group_size is not None:
            parts.append(f"groups of {self.group_size}" if self.group_size else "per channel")
        if self.symmetric is not None:
            parts.append("symmetric" if self.symmetric else "with zero points")
        if self.activations is not None:
            parts.append(f"{self.activations} activations")
        sentence = f"{title} checkpoint (format {self.format})"
        sentence += f": {', '.join(parts)}" if parts else ""
        return sentence + (f"; not quantized: {_listed(self.ignored)}" if self.ignored else "")


def describe_quantization(config: Mapping[str, Any]) -> QuantizedCheckpoint | None:
    """Reads the ``quantization_config`` of a model's ``config.json``.

    Args:
        config: The parsed file, or `PretrainedConfig.to_dict()`.

    Returns:
        What the checkpoint is; None if its weights are plain floats.

    Raises:
        ModelError: If the entry is there and cannot be understood.
    """
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, Mapping) else {}
    entry = config.get("quantization_config") or nested.get("quantization_config")
    entry = entry or config.get("compression_config")
    if not entry:
        return None
    if not isinstance(entry, Mapping):
        raise _malformed("quantization_config", "an object")
    method = _method(entry)
    reader = {
        "gptq": _describe_gptq,
        "awq": _describe_awq,
        "bitsandbytes": _describe_bitsandbytes,
        "compressed-tensors": _describe_compressed_tensors,
        "fp8": _describe_fp8,
    }.get(method)
    if reader is not None:
        return reader(entry)
    return QuantizedCheckpoint(
        method,
        format=method,
        bits=_integer(entry, "bits"),
        group_size=_group_size(entry, "group_size"),
        symmetric=_flag(entry, "sym"),
    )


def dequantized_source(
    source: TensorSource, config: Mapping[str, Any], *, allow: bool
) -> TensorSource:
    """A source of float weights for a checkpoint that may be quantized.

    Args:
        source: The checkpoint's tensors as they are stored.
        config: The model's ``config.json``, parsed.
        allow: Whether to dequantize; otherwise a quantized checkpoint is refused.

    Returns:
        `source` itself if its weights are floats, else a `DequantizedSource`.

    Raises:
        ModelError: If the checkpoint is quantized and `allow` is false, or its layout is not one
            that can be dequantized; says what it is, and what to do.
    """
    description = describe_quantization(config)
    if description is None:
        return source
    if not description.readable:
        raise _unreadable(source, description)
    if not allow:
        raise ModelError(
            f"'{source.identity}' is {description}",
            remedy="start from the float model, or pass dequantize=True (--dequantize) to accept "
            "the error that its weights already have",
        )
    return DequantizedSource(source, description)


class DequantizedSource:
    """Float weights of a quantized checkpoint, computed when they are read.

    Every packed module ``X`` appears as ``X.weight``, float32 [N, K]; its codes, scales and the
    like disappear, as do scales of activations. All other tensors stand as they are.

    Args:
        source: The checkpoint's tensors as they are stored.
        description: From `describe_quantization`.

    Attributes:
        identity: That of `source`.
        description: How the checkpoint is quantized.

    Raises:
        ModelError: If the layout is not known, or the tensors of a layer do not fit together.
    """

    def __init__(self, source: TensorSource, description: QuantizedCheckpoint) -> None:
        if not description.readable:
            raise _unreadable(source, description)
        self.identity = source.identity
        self.description = description
        self._source = source
        self._packed, hidden = find_packed_weights(
            source,
            description.method,
            Stated(description.format, description.bits, description.group_size, description.block),
        )
        self._plain = {
            name: spec
            for name, spec in source.specs().items()
            if name not in hidden and name not in self._packed
        }

    def specs(self) -> Mapping[str, TensorSpec]:
        """Name to shape and dtype; dequantized weights are float32."""
        weights = {
            name: TensorSpec(weight.shape, torch.float32) for name, weight in self._packed.items()
        }
        return {**self._plain, **weights}

    def read(self, name: str) -> Tensor:
        """One tensor; a dequantized weight is computed anew at each call.

        Raises:
            ModelError: If there is no such tensor, or what it is made of cannot be read.
        """
        if name in self._packed:
            return self._packed[name].decode()
        if name not in self._plain:
            raise ModelError(f"the checkpoint '{self.identity}' has no tensor '{name}'")
        return self._source.read(name)

    def fingerprint(self) -> str:
        """Hash over the stored checkpoint's fingerprint and how it is read."""
        content = f"dequantized\0{self._source.fingerprint()}\0{self.description!r}"
        return hashlib.sha256(content.encode()).hexdigest()


def _method(entry: Mapping[str, Any]) -> str:
    method = entry.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower().replace("_", "-") if "compressed" in method else method.lower()
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in entry else "unknown"


def _describe_gptq(entry: Mapping[str, Any]) -> QuantizedCheckpoint:
    layout = _text(entry, "checkpoint_format") or "gptq"
    return QuantizedCheckpoint(
        "gptq",
        format="marlin" if entry.get("is_marlin_format") else layout,
        bits=_integer(entry, "bits"),
        group_size=_group_size(entry, "group_size"),
        symmetric=_flag(entry, "sym"),
        ignored=() if entry.get("lm_head") else ("lm_head",),
    )


def _describe_awq(entry: Mapping[str, Any]) -> QuantizedCheckpoint:
    zero_point = _flag(entry, "zero_point")
    return QuantizedCheckpoint(
        "awq",
        format=(_text(entry, "version") or "gemm").lower(),
        bits=_integer(entry, "bits") or _integer(entry, "w_bit") or 4,
        group_size=_group_size(entry, "group_size"),
        symmetric=None if zero_point is None else not zero_point,
        ignored=_names(entry, "modules_to_not_convert"),
    )


def _describe_bitsandbytes(entry: Mapping[str, Any]) -> QuantizedCheckpoint:
    ignored = _names(entry, "llm_int8_skip_modules")
    if entry.get("load_in_8bit"):
        return QuantizedCheckpoint(
            "bitsandbytes", format="int8", bits=8, group_size=0, symmetric=True, ignored=ignored
        )
    kind = (_text(entry, "bnb_4bit_quant_type") or "fp4").lower()
    return QuantizedCheckpoint("bitsandbytes", format=kind, bits=4, ignored=ignored)


def _describe_fp8(entry: Mapping[str, Any]) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(
        "fp8",
        format="fp8",
        bits=8,
        ignored=_names(entry, "modules_to_not_convert") or _names(entry, "ignored_layers"),
        activations="fp8" if entry.get("activation_scheme") else None,
        block=_block(entry, "weight_block_size"),
    )


def _describe_compressed_tensors(entry: Mapping[str, Any]) -> QuantizedCheckpoint:
    groups = entry.get("config_groups") or {}
    if not isinstance(groups, Mapping):
        raise _malformed("config_groups", "an object")
    schemes = [group for group in groups.values() if isinstance(group, Mapping)]
    weights = [scheme["weights"] for scheme in schemes if scheme.get("weights")]
    if not all(isinstance(item, Mapping) for item in weights):
        raise _malformed("config_groups", "groups with 'weights'")
    inputs = [scheme["input_activations"] for scheme in schemes if scheme.get("input_activations")]
    return QuantizedCheckpoint(
        "compressed-tensors",
        format=_text(entry, "format") or "dense",
        bits=_shared([_integer(item, "num_bits") for item in weights]),
        group_size=_shared([_compressed_group_size(item) for item in weights]),
        symmetric=_shared([_flag(item, "symmetric") for item in weights]),
        ignored=_names(entry, "ignore"),
        activations=_activations(inputs),
        block=_shared([_block(item, "block_structure") for item in weights]),
    )


def _compressed_group_size(weights: Mapping[str, Any]) -> int | None:
    if weights.get("strategy") in ("channel", "tensor"):
        return 0
    return _group_size(weights, "group_size")


def _activations(inputs: list[Any]) -> str | None:
    kinds = {
        f"{item.get('type', 'int')}{item.get('num_bits', '')}"
        for item in inputs
        if isinstance(item, Mapping)
    }
    return " and ".join(sorted(kinds)) or None


def _shared(values: list[Any]) -> Any:
    """The value that all have, None where they differ."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _integer(entry: Mapping[str, Any], key: str) -> int | None:
    value = entry.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise _malformed(key, "an integer")
    return value


def _group_size(entry: Mapping[str, Any], key: str) -> int | None:
    size = _integer(entry, key)
    return 0 if size == -1 else size


def _flag(entry: Mapping[str, Any], key: str) -> bool | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, bool):
        raise _malformed(key, "true or false")
    return value


def _text(entry: Mapping[str, Any], key: str) -> str | None:
    """A string; enumerations of a parsed config count by their value."""
    value = entry.get(key)
    value = getattr(value, "value", value)
    if value is not None and not isinstance(value, str):
        raise _malformed(key, "a string")
    return value


def _names(entry: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = entry.get(key) or ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise _malformed(key, "a list of names")
    return tuple(value)


def _block(entry: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    value = entry.get(key)
    if value is None:
        return None
    if (
        not isinstance(value, (list, tuple))
        or len(value) != 2
        or not all(isinstance(size, int) and size > 0 for size in value)
    ):
        raise _malformed(key, "two positive integers")
    return int(value[0]), int(value[1])


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _malformed(key: str, wanted: str) -> ModelError:
    return ModelError(
        f"'{key}' in the model's quantization_config should be {wanted}",
        remedy="fetch config.json again",
    )


def _unreadable(source: TensorSource, description: QuantizedCheckpoint) -> ModelError:
    return ModelError(
        f"'{source.identity}' is {description}, a layout that cannot be dequantized here",
        remedy="start from the float model",
    )
