"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.backends.cpu import activations, ops
from qcompile.backends.cpu.activations import IntegerActivations
from qcompile.backends.cpu.lower.pack_weight import PackedWeight, pack_weight
from qcompile.backends.cpu.lower.static_activations import static_input
from qcompile.formats import StoredWeight, stored_weight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.lower.rounded_inputs import RoundedInput, rounded_input

aten = torch.ops.aten


class FuseLinear(Pass):
    """Matches the library's matrix kernels.

    1. ``linear(x, dequantize(W), b)``           =>  ``cpu_linear(x, packed W, b, act="float")``
    2. the same with `x` rounded by ``dequantize(quantize(x))``, one scale per token or per group
       of the weight                             =>  ``act="int8_token"`` or ``"int8_group"``
    3. the same with `x` rounded by one stored scale  =>  ``act="int8_static"``, or
       ``"uint8_static"`` with a zero point, which goes into the bias; see `static_activations`.
       Codes of fewer bits are ``"int4_token"`` and so on: `IntegerActivations`
    4. ``embedding(dequantize(W), ids)``         =>  ``cpu_embedding(ids, packed W)``

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
                    new = _linear(editor, node, weight, packed)
                else:
                    new = editor.call(ops.embedding, node.args[1], packed.node, *packed.arguments)
            editor.replace(node, new)
            result.rewrites += 1
        return result


def _linear(editor: Editor, node: fx.Node, weight: StoredWeight, packed: PackedWeight) -> fx.Node:
    x: Any = node.args[0]
    bias: Any = node.args[2] if len(node.args) > 2 else None
    how: tuple[Any, ...] = (activations.FLOAT,)
    rounded = rounded_input(x) if packed.layout.multiplies_bytes else None
    if rounded is not None:
        if (act := measured(rounded, packed.layout.group_size)) is not None:
            x, how = rounded.source, (str(act),)
        elif (static := static_input(editor, node, rounded, weight)) is not None:
            x, bias, how = rounded.source, static.bias, (static.act, static.grid)
    return editor.call(ops.linear, x, packed.node, bias, None, *packed.arguments, *how)


def measured(rounded: RoundedInput, group_size: int) -> IntegerActivations | None:
    """How the kernels round an input whose scales are measured at run time, if they can."""
    if not rounded.is_dynamic or rounded.bits not in activations.WIDTHS:
        return None
    if rounded.group_size not in (0, group_size):
        return None
    return IntegerActivations(rounded.bits, "group" if rounded.group_size else "token")
