"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.packable import layout_of, unpackable_reason
from qcompile.errors import TargetError
from qcompile.formats import LookupFormat, StoredWeight, stored_weight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.cpu.layout import WeightLayout, pack_linear, packed_size
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.lower.rounded_inputs import rounded_input

aten = torch.ops.aten


class FuseLinear(Pass):
    """Matches the library's matrix kernels.

    1. ``linear(x, dequantize(W), b)``           =>  ``cpu_linear(x, packed W, b, act="float")``
    2. the same with `x` rounded by ``dequantize(quantize(x))``, one scale per token or per group
       of the weight                             =>  ``act="int8_token"`` or ``"int8_group"``
    3. ``embedding(dequantize(W), ids)``         =>  ``cpu_embedding(ids, packed W)``

    ``lookup(W)`` stands where ``dequantize(W)`` does; its inputs' rounding stays a node of its own
    where the kernels have no whole numbers to multiply with. A weight is packed once, lazily,
    however many nodes use it.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every quantized layer."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(aten.linear.default, aten.embedding.default):
            weight = stored_weight(node.args[1 if node.target is aten.linear.default else 0])
            if weight is None:
                continue
            with editor.before(node):
                packed = _packed(editor, weight)
                if node.target is aten.linear.default:
                    new = _linear(editor, node, packed)
                else:
                    new = editor.call(ops.embedding, node.args[1], packed.node, *packed.arguments)
            editor.replace(node, new)
            result.rewrites += 1
        return result


@dataclass(frozen=True)
class _Packed:
    """A packed weight: the node that names it, its shape, and how it is stored."""

    node: fx.Node
    shape: tuple[int, ...]
    layout: WeightLayout

    @property
    def arguments(self) -> tuple[int, int, str]:
        """n, k and layout, as the operators take them."""
        n, k = self.shape
        return n, k, str(self.layout)


def _packed(editor: Editor, weight: StoredWeight) -> _Packed:
    reason = unpackable_reason(weight.format)
    if reason is not None:
        raise TargetError(
            f"weight '{weight.name}': {reason}",
            remedy="choose another format for it in the recipe, such as int4-g32 or int8",
        )
    layout = layout_of(weight.format)
    name = f"{weight.name}.codes.packed"
    if name not in editor.program.weights:
        _define_packed(editor.program, name, weight, layout)
    return _Packed(editor.weight(name), weight.shape, layout)


def _define_packed(program: Program, name: str, weight: StoredWeight, layout: WeightLayout) -> None:
    parts = tuple(weight.tensors)
    n, k = weight.shape
    levels = None
    if layout.coding == "table":
        assert isinstance(weight.format, LookupFormat)
        levels = np.array(weight.format.levels, np.float32)

    def pack(*values: Tensor) -> Tensor:
        tensors = dict(zip(parts, map(_to_numpy, values), strict=True))
        outer = tensors.get("outer_scale")
        return torch.from_numpy(
            pack_linear(
                tensors["codes"],
                tensors["scale"],
                tensors.get("zero_point"),
                bits=layout.bits,
                group_size=layout.group_size,
                scale_dtype=layout.scale_dtype,
                coding=layout.coding,
                levels=levels,
                outer_scale=None if outer is None else outer.reshape(-1),
            )
        )

    operands = tuple(str(tensor.target) for tensor in weight.tensors.values())
    spec = TensorSpec((packed_size(n, k, layout),), torch.uint8)
    program.weights.derive(name, operands, pack, spec, exact=True, label="pack")


def _to_numpy(value: Tensor) -> npt.NDArray[Any]:
    """As numpy has it: bfloat16 becomes float32."""
    return (value.float() if value.is_floating_point() else value).numpy()


def _linear(editor: Editor, node: fx.Node, packed: _Packed) -> fx.Node:
    x, act = node.args[0], ops.FLOAT_ACTIVATIONS
    if packed.layout.multiplies_bytes:
        x, act = _activations(x, packed.layout.group_size)
    bias = node.args[2] if len(node.args) > 2 else None
    return editor.call(ops.linear, x, packed.node, bias, None, *packed.arguments, act)


def _activations(x: Any, group_size: int) -> tuple[Any, str]:
    """The float input of a linear, and how it is rounded on the way."""
    rounded = rounded_input(x)
    if rounded is None or not rounded.is_dynamic or rounded.bits != _INT8_BITS:
        return x, ops.FLOAT_ACTIVATIONS
    if rounded.group_size not in (0, group_size):
        return x, ops.FLOAT_ACTIVATIONS
    return rounded.source, ops.INT8_PER_GROUP if rounded.group_size else ops.INT8_PER_TOKEN


_INT8_BITS = 8
