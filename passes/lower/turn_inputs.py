"""Linear layers over turned weights turn their inputs instead."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.formats import VectorFormat, stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.kernels.lookup_vectors.reference import turning_signs
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult

aten = torch.ops.aten


class TurnInputs(Pass):
    """Turns inputs in place of decoded weights: once per token, and not once per weight.

    Before::

        %w = qc.lookup_vectors(@w.codes, @w.scale, "higgs2x256", 64, 64)
        linear(%x, %w)

    After::

        %0 = qc.transform(%x, [@turning.576], "hadamard", [64, 0, 1])
        %1 = qc.lookup_vectors(@w.codes, @w.scale, "higgs2x256", 64, 0)
        linear(%0, %1)

    The transform is orthogonal: ``x (V T^-1)^T = (x T) V^T``. Layers that read the same value share
    its transform.
    """

    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every linear layer over a turned weight."""
        del context
        result = PassResult()
        editor = Editor(program)
        turned: dict[tuple[fx.Node, int], fx.Node] = {}
        plain: dict[fx.Node, fx.Node] = {}
        for linear in program.calls(aten.linear.default):
            x, value = linear.args[0], linear.args[1]
            weight = stored_weight(value)
            if weight is None or not isinstance(weight.format, VectorFormat):
                continue
            assert isinstance(x, fx.Node)
            assert isinstance(value, fx.Node)
            *stored, block = value.args
            assert isinstance(block, int)
            if not block:
                continue
            with editor.before(linear):
                if (x, block) not in turned:
                    turned[x, block] = _turn(editor, x, weight.shape[-1], block)
                if value not in plain:
                    plain[value] = editor.call(dialect.lookup_vectors, *stored, 0)
            linear.update_arg(0, turned[x, block])
            linear.update_arg(1, plain[value])
            result.rewrites += 1
        return result


def _turn(editor: Editor, x: fx.Node, size: int, block: int) -> fx.Node:
    name = f"turning.{size}"
    if name not in editor.program.weights:
        editor.program.weights.put(name, turning_signs(size))
    return editor.call(dialect.transform, x, [editor.weight(name)], "hadamard", [block, 0, 1])
