"""Finds the weights that bitsandbytes stored: LLM.int8, NF4 and FP4, nested or not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.frontends.packed.layers import Layers
from qcompile.frontends.packed.layouts import (
    decode_codebook4,
    decode_nested_absmax,
    decode_scaled,
)

_INT8_LIMIT = 127  # weight = code * SCB / 127
_ROW_MAJOR = 0  # weight_format
_STATE_PREFIX = "weight.quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 1 << 16


def find_bitsandbytes(layers: Layers) -> None:
    """Adds all layers with the state that bitsandbytes saves beside its weights."""
    for module in layers.modules("SCB"):
        _add_int8(layers, module)
    for module in layers.modules("weight.absmax"):
        _add_4bit(layers, module)


def _add_int8(layers: Layers, module: str) -> None:
    weight, scale = layers.parts(module, ("weight", "SCB"))
    layers.require_matrix(module, weight)
    outputs, inputs = weight.shape
    layers.expect(module, "weight", (outputs, inputs), torch.int8)
    layers.check(module, scale.elements == outputs, f"{scale.elements} scales for {outputs}")
    layout = f"{module}.weight_format"

    def decode() -> Tensor:
        if layout in layers.specs and int(layers.source.read(layout).reshape(-1)[0]) != _ROW_MAJOR:
            raise layers.broken(module, "a layout of a GPU's own (weight_format)")
        weight, scale = layers.read(module, ("weight", "SCB"))
        per_row = scale.reshape(-1, 1).to(torch.float32) / _INT8_LIMIT
        return decode_scaled(weight, per_row, None, (1, inputs))

    layers.add(module, (outputs, inputs), decode, ("SCB", "weight_format"))


def _add_4bit(layers: Layers, module: str) -> None:
    state = _quant_state(layers, module)
    shape = state.shape
    elements = torch.Size(shape).numel()
    packed, absmax = layers.parts(module, ("weight", "weight.absmax"))
    blocks = -(-elements // state.block_size)
    layers.check(
        module,
        packed.dtype == torch.uint8 and packed.elements == -(-elements // 2),
        f"{packed.elements} bytes for {elements} codes",
    )
    layers.check(module, absmax.elements == blocks, f"{absmax.elements} absmax for {blocks}")
    layers.check(module, layers.elements(module, "weight.quant_map") == 16, "no quant_map of 16")
    if state.nested_block_size:
        layers.check(
            module,
            layers.elements(module, "weight.nested_quant_map") == 256
            and layers.elements(module, "weight.nested_absmax")
            == -(-blocks // state.nested_block_size),
            "nested absmax values that do not fit",
        )

    def decode() -> Tensor:
        packed, absmax, codebook = layers.read(
            module, ("weight", "weight.absmax", "weight.quant_map")
        )
        if state.nested_block_size:
            outer, outer_codes = layers.read(
                module, ("weight.nested_absmax", "weight.nested_quant_map")
            )
            absmax = decode_nested_absmax(
                absmax, outer, outer_codes, state.nested_block_size, state.nested_offset
            )
        absmax, codebook = absmax.reshape(-1).float(), codebook.reshape(-1).float()
        return decode_codebook4(packed, absmax, codebook, state.block_size, shape)

    prefix = f"{module}."
    state_names = [name for name in layers.specs if name.startswith(f"{prefix}weight.")]
    layers.add(module, shape, decode, tuple(name[len(prefix) :] for name in state_names))


def _quant_state(layers: Layers, module: str) -> _QuantState:
    prefix = f"{module}.{_STATE_PREFIX}"
    names = [name for name in layers.specs if name.startswith(prefix)]
    if len(names) != 1 or layers.specs[names[0]].bytes > _MAX_STATE_BYTES:
        raise layers.broken(module, "no readable quant_state")
    try:
        state = json.loads(bytes(layers.source.read(names[0]).reshape(-1).tolist()))
        return _QuantState.parse(state)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise layers.broken(module, f"a quant_state that cannot be read ({error})") from error


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
