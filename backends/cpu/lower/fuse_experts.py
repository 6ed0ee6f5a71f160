"""Quantized experts become one node, over packed weights."""

from __future__ import annotations

from typing import Any

from torch import fx

from qcompile.backends.cpu import expert_ops
from qcompile.backends.cpu.lower.pack_weight import pack_weight
from qcompile.formats import stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult


class FuseExperts(Pass):
    """Matches the library's kernel for routed experts.

    ``experts(x, index, weight, dequantize(U), b, dequantize(D), c, ...)``  =>
    ``cpu_experts(x, index, weight, packed U, b, packed D, c, ...)``

    The kernel reads the matrices of the experts that tokens are routed to, and no others. Experts
    of which one matrix is float are left to standard operators.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites all experts whose weights are both quantized.

        Raises:
            TargetError: The kernels cannot read a format.
        """
        del context
        result = PassResult()
        editor = Editor(program)
        for call in list(program.calls(dialect.experts)):
            with editor.before(call):
                fused = _fused(editor, call)
            if fused is not None:
                editor.replace(call, fused)
                result.rewrites += 1
        return result


def _fused(editor: Editor, call: fx.Node) -> fx.Node | None:
    x, index, weight, up, up_bias, down, down_bias, *gate = call.args
    stored_up, stored_down = stored_weight(up), stored_weight(down)
    if stored_up is None or stored_down is None:
        return None
    packed_up, packed_down = pack_weight(editor, stored_up), pack_weight(editor, stored_down)
    operands: list[Any] = [x, index, weight, packed_up.node, up_bias, packed_down.node, down_bias]
    sizes = packed_up.shape
    layouts = (str(packed_up.layout), str(packed_down.layout))
    return editor.call(expert_ops.experts, *operands, *sizes, *layouts, *gate)
