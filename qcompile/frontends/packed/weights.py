"""Finds the packed weights of GPTQ, AWQ, compressed-tensors and FP8 checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.frontends.packed.bitsandbytes import find_bitsandbytes
from qcompile.frontends.packed.layers import Layers, PackedWeight, Stated
from qcompile.frontends.packed.layouts import (
    decode_awq,
    decode_gptq,
    decode_packed,
    decode_scaled,
    unpack_stream,
    unpack_words,
)
from qcompile.ir.weights import TensorSource

_WORD_BITS = 32
_GPTQ_BITS = (2, 3, 4, 8)
_SCALED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)

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


def find_packed_weights(
    source: TensorSource, method: str, stated: Stated
) -> tuple[dict[str, PackedWeight], set[str]]:
    """All packed weights of a checkpoint.

    Args:
        source: The tensors as they are stored.
        method: ``"gptq"``, ``"awq"``, ``"compressed-tensors"``, ``"bitsandbytes"`` or ``"fp8"``.
        stated: What the config says.

    Returns:
        Name (``X.weight``) to weight, and the names of the tensors that they are made of, with
        those that belong to activations.

    Raises:
        ModelError: If tensors of a layer are missing, or their shapes contradict each other.
    """
    layers = Layers(source, stated)
    find = {
        "gptq": _find_gptq,
        "awq": _find_awq,
        "bitsandbytes": find_bitsandbytes,
        "compressed-tensors": _find_compressed_tensors,
        "fp8": _find_scaled,
    }[method]
    find(layers)
    return layers.found, layers.hidden


def _find_gptq(layers: Layers) -> None:
    for module in layers.modules("qweight"):
        qweight, qzeros, scales = layers.parts(module, ("qweight", "qzeros", "scales"))
        for spec in (qweight, qzeros, scales):
            layers.require_matrix(module, spec)
        groups, outputs = scales.shape
        bits = qzeros.shape[1] * _WORD_BITS // max(outputs, 1)
        layers.check(module, bits in _GPTQ_BITS, f"{bits} bits (from the shape of qzeros)")
        inputs = qweight.shape[0] * _WORD_BITS // bits
        layers.expect(module, "qweight", (inputs * bits // _WORD_BITS, outputs), torch.int32)
        layers.expect(module, "qzeros", (groups, outputs * bits // _WORD_BITS), torch.int32)
        layers.add(
            module,
            (outputs, inputs),
            _gptq_decoder(layers, module, bits, layers.grouping(module, "g_idx", inputs, groups)),
            ("qweight", "qzeros", "scales", "g_idx"),
        )


def _gptq_decoder(
    layers: Layers, module: str, bits: int, groups: Callable[[], Tensor]
) -> Callable[[], Tensor]:
    zero_offset = 0 if layers.stated.format == "gptq_v2" else 1

    def decode() -> Tensor:
        qweight, qzeros, scales = layers.read(module, ("qweight", "qzeros", "scales"))
        return decode_gptq(qweight, qzeros, scales, groups(), bits, zero_offset)

    return decode


def _find_awq(layers: Layers) -> None:
    for module in layers.modules("qweight"):
        qweight, _, scales = layers.parts(module, ("qweight", "qzeros", "scales"))
        layers.require_matrix(module, qweight)
        layers.require_matrix(module, scales)
        groups, outputs = scales.shape
        inputs = qweight.shape[0]
        layers.check(module, outputs % 8 == 0, f"{outputs} outputs, no multiple of 8")
        layers.expect(module, "qweight", (inputs, outputs // 8), torch.int32)
        layers.expect(module, "qzeros", (groups, outputs // 8), torch.int32)
        layers.add(
            module,
            (outputs, inputs),
            _awq_decoder(layers, module, layers.grouping(module, None, inputs, groups)),
            ("qweight", "qzeros", "scales"),
        )


def _awq_decoder(layers: Layers, module: str, groups: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def decode() -> Tensor:
        qweight, qzeros, scales = layers.read(module, ("qweight", "qzeros", "scales"))
        return decode_awq(qweight, qzeros, scales, groups())

    return decode


def _find_compressed_tensors(layers: Layers) -> None:
    for module in layers.modules("weight_packed"):
        _add_compressed(layers, module)
    _find_scaled(layers)


def _add_compressed(layers: Layers, module: str) -> None:
    packed, scale = layers.parts(module, ("weight_packed", "weight_scale"))
    layers.check(
        module,
        packed.dtype == torch.int32,
        f"weight_packed of type {packed.dtype} (an FP4 or MX format)",
    )
    layers.require_matrix(module, packed)
    outputs, inputs = _stored_shape(layers, module)
    layers.check(module, packed.shape[0] == outputs, f"{packed.shape[0]} rows for {outputs}")
    bits, padded = _packing(layers, module, inputs, packed.shape[1])
    groups = scale.shape[1] if len(scale.shape) == 2 else 1
    layers.check(
        module,
        scale.elements in (groups, outputs * groups),
        f"scales of shape {list(scale.shape)} for {outputs} outputs",
    )
    columns = layers.grouping(module, "weight_g_idx", inputs, groups)

    def decode() -> Tensor:
        packed, scale = layers.read(module, ("weight_packed", "weight_scale"))
        zero = _zero_point(layers, module, bits, outputs, padded)
        per_row = scale.reshape(-1, groups)
        return decode_packed(packed, per_row, zero, columns(), bits, padded_words=padded)

    suffixes = ("packed", "scale", "zero_point", "shape", "g_idx")
    used = tuple(f"weight_{suffix}" for suffix in suffixes)
    layers.add(module, (outputs, inputs), decode, used)
    _hide_activation_scales(layers)


def _stored_shape(layers: Layers, module: str) -> tuple[int, int]:
    (spec,) = layers.parts(module, ("weight_shape",))
    layers.check(module, spec.elements == 2, f"weight_shape of {spec.elements} numbers")
    (stored,) = layers.read(module, ("weight_shape",))
    outputs, inputs = (int(size) for size in stored.reshape(-1))
    layers.check(module, outputs > 0 and inputs > 0, f"weight_shape {[outputs, inputs]}")
    return outputs, inputs


def _packing(layers: Layers, module: str, inputs: int, words: int) -> tuple[int, bool]:
    """Bits per code, and whether words hold only whole codes; from the number of words."""
    stated = layers.stated.bits
    candidates = [bits for bits in range(1, 9) if stated in (None, bits)]
    for bits in candidates:
        if -(-inputs * bits // _WORD_BITS) == words:
            return bits, False
    for bits in candidates:
        if -(-inputs // (_WORD_BITS // bits)) == words:
            return bits, True
    raise layers.broken(module, f"rows of {words} words for {inputs} inputs")


def _zero_point(
    layers: Layers, module: str, bits: int, outputs: int, padded: bool
) -> Tensor | None:
    if f"{module}.weight_zero_point" not in layers.specs:
        return None
    (stored,) = layers.read(module, ("weight_zero_point",))
    if stored.dtype == torch.int32 and stored.shape[0] != outputs:  # packed along the outputs
        unpack = unpack_words if padded else unpack_stream
        codes: Tensor = unpack(stored.t().contiguous(), bits, outputs).t()
        return codes
    offset = 2 ** (bits - 1)  # stored in the signed range
    codes = stored.reshape(stored.shape[0], -1).to(torch.int32)
    return codes.add(offset)


def _find_scaled(layers: Layers) -> None:
    """Weights in an 8-bit type of their own beside ``weight_scale`` or ``weight_scale_inv``."""
    for suffix in ("weight_scale", "weight_scale_inv"):
        for module in layers.modules(suffix):
            if f"{module}.weight" not in layers.found:
                _add_scaled(layers, module, suffix)
    _hide_activation_scales(layers)


def _add_scaled(layers: Layers, module: str, suffix: str) -> None:
    weight, scale = layers.parts(module, ("weight", suffix))
    if weight.dtype not in _SCALED_DTYPES:  # floats still, with the scales they would take
        layers.hide(module, (suffix, "weight_zero_point"))
        return
    layers.require_matrix(module, weight)
    outputs, inputs = weight.shape
    grid = scale.shape if len(scale.shape) == 2 else (scale.elements, 1)
    stated = layers.stated.block or (0, layers.stated.group_size or 0)
    block = (
        _block_size(layers, module, outputs, grid[0], stated[0]),
        _block_size(layers, module, inputs, grid[1], stated[1]),
    )
    zero_name = f"{module}.weight_zero_point"
    has_zero = zero_name in layers.specs
    if has_zero:
        same_size = layers.specs[zero_name].elements == scale.elements
        layers.check(module, same_size, "zero points of another shape than its scales")

    def decode() -> Tensor:
        weight, scale = layers.read(module, ("weight", suffix))
        zero = layers.source.read(zero_name).reshape(grid) if has_zero else None
        return decode_scaled(weight, scale.reshape(grid), zero, block)

    layers.add(module, (outputs, inputs), decode, (suffix, "weight_zero_point"))


def _block_size(layers: Layers, module: str, length: int, blocks: int, stated: int) -> int:
    """Elements per block of an axis; `stated` is what the config says (0: nothing)."""
    if stated > 0 and -(-length // stated) == blocks:
        return stated
    layers.check(module, blocks > 0 and length % blocks == 0, f"{blocks} scales for {length}")
    return length // blocks


def _hide_activation_scales(layers: Layers) -> None:
    layers.hidden |= {
        name for name in layers.specs if name.rpartition(".")[2] in _ACTIVATION_SUFFIXES
    }
