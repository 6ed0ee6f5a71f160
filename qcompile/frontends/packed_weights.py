"""Finds the packed weights of a quantized checkpoint and checks that their tensors fit together.

What a layer is made of is read off names and shapes, not off the config alone: configs have
overrides per layer, and the tensors are what counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import ModelError
from qcompile.frontends.packed_layouts import (
    decode_awq,
    decode_codebook4,
    decode_gptq,
    decode_nested_absmax,
    decode_packed,
    decode_scaled,
    unpack_stream,
    unpack_words,
)
from qcompile.ir.weights import TensorSource, TensorSpec

_WORD_BITS = 32
_INT8_LIMIT = 127  # bitsandbytes: weight = code * SCB / 127
_ROW_MAJOR = 0  # bitsandbytes' weight_format
_STATE_PREFIX = "weight.quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)

# Scales of activations and caches: no part of a float model.
_ACTIVATION_SUFFIXES = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "output_scale",
    "output_zero_point",
    "activation_scale",
    "k_scale",
    "v_scale",
)


@dataclass(frozen=True)
class PackedWeight:
    """A weight that can be computed.

    Attributes:
        shape: [N, K] of the weight.
        decode: Reads and decodes it to float32.
    """

    shape: tuple[int, ...]
    decode: Callable[[], Tensor]


def find_packed_weights(
    source: TensorSource,
    *,
    method: str,
    format: str,
    bits: int | None,
    group_size: int | None,
    block: tuple[int, int] | None,
) -> tuple[dict[str, PackedWeight], set[str]]:
    """All packed weights of a checkpoint.

    Args:
        source: The tensors as they are stored.
        method: As in `QuantizedCheckpoint`; so are the following.
        format: The variant of the layout.
        bits: Where the config gives one number for all layers.
        group_size: Likewise.
        block: Likewise.

    Returns:
        Name (``X.weight``) to weight, and the names of the tensors that they are made of, with
        those that belong to activations.

    Raises:
        ModelError: If tensors of a layer are missing, or their shapes contradict each other.
    """
    finder = _Finder(source, source.specs(), format, bits, group_size, block)
    find = {
        "gptq": finder.gptq,
        "awq": finder.awq,
        "compressed-tensors": finder.compressed_tensors,
        "bitsandbytes": finder.bitsandbytes,
        "fp8": finder.scaled,
    }[method]
    find()
    finder.hide_activation_scales()
    return finder.found, finder.hidden


class _Finder:
    """Collects packed weights; one method per layout."""

    def __init__(
        self,
        source: TensorSource,
        specs: Mapping[str, TensorSpec],
        format: str,
        bits: int | None,
        group_size: int | None,
        block: tuple[int, int] | None,
    ) -> None:
        self.source = source
        self.specs = specs
        self.format = format
        self.bits = bits
        self.group_size = group_size
        self.block = block
        self.found: dict[str, PackedWeight] = {}
        self.hidden: set[str] = set()

    def gptq(self) -> None:
        for module in self._modules("qweight"):
            qweight, qzeros, scales = self._parts(module, ("qweight", "qzeros", "scales"))
            self._require(module, scales, rank=2)
            groups, outputs = scales.shape
            bits = qzeros.shape[-1] * _WORD_BITS // max(outputs, 1)
            self._check(module, bits in (2, 3, 4, 8), f"{bits} bits (from the shape of qzeros)")
            inputs = qweight.shape[0] * _WORD_BITS // bits
            words = outputs * bits // _WORD_BITS
            self._expect(module, "qweight", (inputs * bits // _WORD_BITS, outputs), torch.int32)
            self._expect(module, "qzeros", (groups, words), torch.int32)
            self._add(
                module,
                (outputs, inputs),
                self._gptq_decoder(module, bits, inputs, groups),
                ("qweight", "qzeros", "scales", "g_idx"),
            )

    def awq(self) -> None:
        for module in self._modules("qweight"):
            qweight, _, scales = self._parts(module, ("qweight", "qzeros", "scales"))
            self._require(module, scales, rank=2)
            self._require(module, qweight, rank=2)
            groups, outputs = scales.shape
            inputs = qweight.shape[0]
            self._expect(module, "qweight", (inputs, outputs // 8), torch.int32)
            self._expect(module, "qzeros", (groups, outputs // 8), torch.int32)
            self._check(module, outputs % 8 == 0, f"{outputs} outputs, no multiple of 8")
            self._add(
                module,
                (outputs, inputs),
                self._awq_decoder(module, inputs, groups),
                ("qweight", "qzeros", "scales"),
            )

    def compressed_tensors(self) -> None:
        for module in self._modules("weight_packed"):
            self._compressed_packed(module)
        self.scaled()

    def scaled(self) -> None:
        """Weights in a type of their own beside ``weight_scale`` or ``weight_scale_inv``."""
        for suffix in ("weight_scale", "weight_scale_inv"):
            for module in self._modules(suffix):
                if f"{module}.weight" not in self.found:
                    self._scaled(module, suffix)

    def bitsandbytes(self) -> None:
        for module in self._modules("SCB"):
            self._bitsandbytes_int8(module)
        for module in self._modules("weight.absmax"):
            self._bitsandbytes_4bit(module)

    def hide_activation_scales(self) -> None:
        self.hidden |= {
            name for name in self.specs if name.rpartition(".")[2] in _ACTIVATION_SUFFIXES
        }

    # --- one layer of each layout ---

    def _gptq_decoder(
        self, module: str, bits: int, inputs: int, groups: int
    ) -> Callable[[], Tensor]:
        columns = self._grouping(module, "g_idx", inputs, groups)
        zero_offset = 0 if self.format == "gptq_v2" else 1

        def decode() -> Tensor:
            qweight, qzeros, scales = self._read(module, ("qweight", "qzeros", "scales"))
            return decode_gptq(qweight, qzeros, scales, columns(), bits, zero_offset)

        return decode

    def _awq_decoder(self, module: str, inputs: int, groups: int) -> Callable[[], Tensor]:
        columns = self._grouping(module, None, inputs, groups)

        def decode() -> Tensor:
            return decode_awq(*self._read(module, ("qweight", "qzeros", "scales")), columns())

        return decode

    def _compressed_packed(self, module: str) -> None:
        packed, scale = self._parts(module, ("weight_packed", "weight_scale"))
        self._check(
            module,
            packed.dtype == torch.int32 and len(packed.shape) == 2,
            f"weight_packed of type {packed.dtype} (an FP4 or MX format?)",
        )
        outputs, inputs = self._stored_shape(module)
        self._check(module, packed.shape[0] == outputs, f"{packed.shape[0]} rows for {outputs}")
        bits, padded = self._packing(module, inputs, packed.shape[1])
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        columns = self._grouping(module, "weight_g_idx", inputs, groups)

        def decode() -> Tensor:
            packed, scale = self._read(module, ("weight_packed", "weight_scale"))
            zero = self._packed_zero_point(module, bits, outputs, padded)
            matrix = scale.reshape(-1, groups)
            return decode_packed(packed, matrix, zero, columns(), bits, padded_words=padded)

        used = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        self._check(
            module,
            scale.elements in (groups, outputs * groups),
            f"scales of shape {list(scale.shape)}",
        )
        self._add(module, (outputs, inputs), decode, (*used, "weight_g_idx"))

    def _packing(self, module: str, inputs: int, words: int) -> tuple[int, bool]:
        """Bits per code, and whether words hold only whole codes; from the number of words."""
        candidates = range(1, 9) if self.bits is None else (self.bits,)
        for bits in (bits for bits in candidates if 1 <= bits <= 8):
            if -(-inputs * bits // _WORD_BITS) == words:
                return bits, False
            if -(-inputs // (_WORD_BITS // bits)) == words:
                return bits, True
        raise self._broken(module, f"{words} words for {inputs} inputs")

    def _packed_zero_point(
        self, module: str, bits: int, outputs: int, padded: bool
    ) -> Tensor | None:
        name = f"{module}.weight_zero_point"
        if name not in self.specs:
            return None
        stored = self.source.read(name)
        if stored.dtype == torch.int32 and stored.shape[0] != outputs:  # packed along the outputs
            unpack = unpack_words if padded else unpack_stream
            return unpack(stored.t().contiguous(), bits, outputs).t().to(torch.int32)
        offset = 2 ** (bits - 1)
        return stored.reshape(stored.shape[0], -1).to(torch.int32) + offset

    def _stored_shape(self, module: str) -> tuple[int, int]:
        name = f"{module}.weight_shape"
        if name not in self.specs or self.specs[name].elements != 2:
            raise self._broken(module, "no weight_shape of two numbers")
        outputs, inputs = (int(size) for size in self.source.read(name).reshape(-1))
        self._check(module, outputs > 0 and inputs > 0, f"weight_shape {[outputs, inputs]}")
        return outputs, inputs

    def _scaled(self, module: str, suffix: str) -> None:
        weight, scale = self._parts(module, ("weight", suffix))
        if weight.dtype not in (torch.int8, *_FLOAT8):  # floats, kept beside their scales
            self.hidden |= {f"{module}.{suffix}", f"{module}.weight_zero_point"} & set(self.specs)
            return
        self._require(module, weight, rank=2)
        outputs, inputs = weight.shape
        grid = scale.shape if len(scale.shape) == 2 else (scale.elements, 1)
        rows = self._block_size(
            module, outputs, grid[0], 0 if self.block is None else self.block[0]
        )
        wanted = (self.group_size or 0) if self.block is None else self.block[1]
        columns = self._block_size(module, inputs, grid[1], wanted)

        def decode() -> Tensor:
            weight, scale = self._read(module, ("weight", suffix))
            zero = None
            if f"{module}.weight_zero_point" in self.specs:
                zero = self.source.read(f"{module}.weight_zero_point").reshape(grid)
            return decode_scaled(weight, scale.reshape(grid), zero, (rows, columns))

        self._add(module, (outputs, inputs), decode, (suffix, "weight_zero_point"))

    def _block_size(self, module: str, length: int, blocks: int, wanted: int) -> int:
        """Elements per block of an axis; `wanted` is what the config says (0: nothing)."""
        if blocks == length:
            return 1
        if wanted > 0 and -(-length // wanted) == blocks:
            return wanted
        self._check(module, blocks > 0 and length % blocks == 0, f"{blocks} scales for {length}")
        return length // blocks

    def _bitsandbytes_int8(self, module: str) -> None:
        weight, scale = self._parts(module, ("weight", "SCB"))
        self._require(module, weight, rank=2)
        outputs, inputs = weight.shape
        self._expect(module, "weight", (outputs, inputs), torch.int8)
        self._check(module, scale.elements == outputs, f"{scale.elements} scales for {outputs}")
        layout = f"{module}.weight_format"

        def decode() -> Tensor:
            if layout in self.specs and int(self.source.read(layout).reshape(-1)[0]) != _ROW_MAJOR:
                raise self._broken(module, "a layout of a GPU's own (weight_format)")
            weight, scale = self._read(module, ("weight", "SCB"))
            per_row = scale.reshape(-1, 1).to(torch.float32) / _INT8_LIMIT
            return decode_scaled(weight, per_row, None, (1, inputs))

        self._add(module, (outputs, inputs), decode, ("SCB", "weight_format"))

    def _bitsandbytes_4bit(self, module: str) -> None:
        state = self._quant_state(module)
        shape = state.shape
        elements = torch.Size(shape).numel()
        packed, absmax = self._parts(module, ("weight", "weight.absmax"))
        blocks = -(-elements // state.block_size)
        self._check(
            module,
            packed.dtype == torch.uint8 and packed.elements == -(-elements // 2),
            f"{packed.elements} bytes for {elements} codes",
        )
        self._check(module, absmax.elements == blocks, f"{absmax.elements} absmax for {blocks}")
        self._check(module, self._elements(module, "weight.quant_map") == 16, "no quant_map of 16")
        if state.nested_block_size:
            self._check(
                module,
                self._elements(module, "weight.nested_quant_map") == 256
                and self._elements(module, "weight.nested_absmax")
                == -(-blocks // state.nested_block_size),
                "nested absmax values that do not fit",
            )

        def decode() -> Tensor:
            packed, absmax, codebook = self._read(
                module, ("weight", "weight.absmax", "weight.quant_map")
            )
            if state.nested_block_size:
                outer, outer_codes = self._read(
                    module, ("weight.nested_absmax", "weight.nested_quant_map")
                )
                absmax = decode_nested_absmax(
                    absmax, outer, outer_codes, state.nested_block_size, state.nested_offset
                )
            absmax, codebook = absmax.reshape(-1).float(), codebook.reshape(-1).float()
            return decode_codebook4(packed, absmax, codebook, state.block_size, shape)

        self._add(module, shape, decode, ())
        self.hidden |= {name for name in self.specs if name.startswith(f"{module}.weight.")}

    def _quant_state(self, module: str) -> _QuantState:
        prefix = f"{module}.{_STATE_PREFIX}"
        names = [name for name in self.specs if name.startswith(prefix)]
        if len(names) != 1 or self.specs[names[0]].bytes > _MAX_STATE_BYTES:
            raise self._broken(module, "no readable quant_state")
        try:
            state = json.loads(bytes(self.source.read(names[0]).reshape(-1).tolist()))
            return _QuantState.parse(state)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise self._broken(module, f"a quant_state that cannot be read ({error})") from error

    # --- what layouts share ---

    def _grouping(
        self, module: str, index: str | None, inputs: int, groups: int
    ) -> Callable[[], Tensor]:
        """The group of every input: stored, or as the sizes imply."""
        if index is not None and f"{module}.{index}" in self.specs:
            self._check(
                module, self.specs[f"{module}.{index}"].shape == (inputs,), f"{index} of wrong size"
            )
        size = self.group_size or inputs
        if groups == 0 or -(-inputs // size) != groups:
            self._check(module, groups > 0 and inputs % groups == 0, f"{groups} groups of {inputs}")
            size = inputs // groups

        def columns() -> Tensor:
            if index is not None and f"{module}.{index}" in self.specs:
                stored = self.source.read(f"{module}.{index}").long()
                if int(stored.min()) >= 0:  # compressed-tensors fills what it does not use with -1
                    self._check(module, int(stored.max()) < groups, f"{index} past the last group")
                    return stored
            return torch.arange(inputs) // size

        return columns

    def _modules(self, suffix: str) -> list[str]:
        return [name[: -len(suffix) - 1] for name in self.specs if name.endswith(f".{suffix}")]

    def _parts(self, module: str, suffixes: tuple[str, ...]) -> tuple[TensorSpec, ...]:
        missing = [suffix for suffix in suffixes if f"{module}.{suffix}" not in self.specs]
        if missing:
            raise self._broken(module, f"no tensor '{module}.{missing[0]}'")
        return tuple(self.specs[f"{module}.{suffix}"] for suffix in suffixes)

    def _read(self, module: str, suffixes: tuple[str, ...]) -> tuple[Tensor, ...]:
        return tuple(self.source.read(f"{module}.{suffix}") for suffix in suffixes)

    def _elements(self, module: str, suffix: str) -> int:
        return self._parts(module, (suffix,))[0].elements

    def _add(
        self,
        module: str,
        shape: tuple[int, ...],
        decode: Callable[[], Tensor],
        suffixes: tuple[str, ...],
    ) -> None:
        self.found[f"{module}.weight"] = PackedWeight(shape, decode)
        self.hidden |= {f"{module}.{suffix}" for suffix in suffixes} & set(self.specs)

    def _expect(self, module: str, suffix: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        spec = self.specs[f"{module}.{suffix}"]
        self._check(
            module,
            spec == TensorSpec(shape, dtype),
            f"{suffix} of shape {list(spec.shape)} and type {spec.dtype}, expected {list(shape)} "
            f"and {dtype}",
        )

    def _require(self, module: str, spec: TensorSpec, *, rank: int) -> None:
        self._check(module, len(spec.shape) == rank, f"a tensor of shape {list(spec.shape)}")

    def _check(self, module: str, holds: bool, what: str) -> None:
        if not holds:
            raise self._broken(module, what)

    def _broken(self, module: str, what: str) -> ModelError:
        return ModelError(
            f"layer '{module}' of '{self.source.identity}' cannot be dequantized: it has {what}",
            remedy="fetch the checkpoint again, or start from the float model",
        )


@dataclass(frozen=True)
class _QuantState:
    """bitsandbytes' description of a 4-bit tensor; `nested_block_size` is 0 without nesting."""

    shape: tuple[int, ...]
    block_size: int
    nested_block_size: int
    nested_offset: float

    @staticmethod
    def parse(state: Mapping[str, object]) -> _QuantState:
        """Reads the JSON object of a quant_state.

        Raises:
            KeyError: If something is missing.
            TypeError: If it is not of the type it should have.
            ValueError: If a size makes no sense.
        """
        sizes = state["shape"]
        if not isinstance(sizes, list):
            raise TypeError("shape is no list")
        shape = tuple(_positive(size) for size in sizes)
        block_size = _positive(state["blocksize"])
        if block_size % 2:
            raise ValueError(f"blocks of {block_size} elements")
        nested = "nested_blocksize" in state
        offset = state["nested_offset"] if nested else 0.0
        if isinstance(offset, bool) or not isinstance(offset, (int, float)):
            raise TypeError("nested_offset is no number")
        nested_block_size = _positive(state["nested_blocksize"]) if nested else 0
        return _QuantState(shape, block_size, nested_block_size, float(offset))


def _positive(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no size")
    if value <= 0:
        raise ValueError(f"{value} is no size")
    return value
