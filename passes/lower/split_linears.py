"""Linear layers over split weights become one layer per part."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.formats import SplitFormat
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.lower.stored_linears import stored_linears
from qcompile.passes.quantize.split_inputs import regroup_input

aten = torch.ops.aten


class SplitLinears(Pass):
    """Multiplies each part of a split weight with the inputs that it is for.

    Before::

        %w = index_select(cat([dequantize(W0), _to_copy(W1)], -1), -1, @places)
        linear(%x, %w, %b)

    After::

        %0 = linear(index_select(%x, -1, @columns0), dequantize(W0), %b)
        %1 = add(linear(index_select(%x, -1, @columns1), _to_copy(W1)), %0)

    Where the input is itself put together from parts by the same places (`regroup_input`), each
    layer reads its part. The weight as a whole is never made.
    """

    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every linear layer over a split weight."""
        del context
        result = PassResult()
        editor = Editor(program)
        for linear, weight in stored_linears(program, SplitFormat):
            _split(editor, linear, [part.value for part in weight.parts])
            result.rewrites += 1
        if result.rewrites:
            program.graph.eliminate_dead_code()
        return result


def _split(editor: Editor, linear: fx.Node, weights: list[fx.Node]) -> None:
    inputs = regroup_input(editor, linear)
    bias = linear.args[2] if len(linear.args) > 2 else None
    with editor.before(linear):
        total = editor.call(aten.linear.default, inputs[0], weights[0], bias)
        for value, weight in zip(inputs[1:], weights[1:], strict=True):
            part = editor.call(aten.linear.default, value, weight)
            total = editor.call(aten.add.Tensor, part, total)
    editor.replace(linear, total)
