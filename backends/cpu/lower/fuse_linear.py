"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.lower.pack_weight import PackedWeight, pack_weight
from qcompile.formats import stored_weight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
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
                packed = pack_weight(editor, weight)
                if node.target is aten.linear.default:
                    new = _linear(editor, node, packed)
                else:
                    new = editor.call(ops.embedding, node.args[1], packed.node, *packed.arguments)
            editor.replace(node, new)
            result.rewrites += 1
        return result


def _linear(editor: Editor, node: fx.Node, packed: PackedWeight) -> fx.Node:
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
