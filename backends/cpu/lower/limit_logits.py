"""Logits only for the positions that somebody will read."""

from __future__ import annotations

from dataclasses import replace

import torch

from qcompile.backends.cpu import ops
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Port, Role
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.quantize.layers import LINEAR


class LimitLogits(Pass):
    """``linear(x, head)``  =>  ``linear(last_positions(x, num_logits), head)``.

    `num_logits` is a new input: 1 while generating, the number of tokens for an evaluation. The
    projection to the vocabulary is the largest layer of many models; a long prompt needs its last
    row only.
    """

    ensures = frozenset({Fact.LOWERED})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Applies to programs that return logits and keep a cache."""
        del context
        result = PassResult()
        if not program.signature.is_causal_lm:
            return result
        head = _head(program)
        if head is None:
            return result
        editor = Editor(program)
        x = head.args[0]
        assert isinstance(x, torch.fx.Node)
        with editor.after(program.inputs[-1]):
            count = program.graph.placeholder("num_logits")
        with program.fake_mode:
            count.meta["val"] = torch.empty(1, dtype=torch.int64, device="meta")
        with editor.before(head):
            head.update_arg(0, editor.call(ops.keep_last, x, count))
        inputs = (*program.signature.inputs, Port("num_logits", Role.NUM_LOGITS))
        program.signature = replace(program.signature, inputs=inputs)
        result.rewrites += 1
        return result


_POSITIONWISE = frozenset(
    {
        torch.ops.aten.mul.Tensor,
        torch.ops.aten.div.Tensor,
        torch.ops.aten.tanh.default,
        torch.ops.aten.to.dtype,
    }
)
"""What may stand between the projection and the logits (scaling, soft-capping)."""


def _head(program: Program) -> torch.fx.Node | None:
    """The projection behind the logits, if nothing between them mixes positions."""
    node = program.results[0]
    while node.target in _POSITIONWISE and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    is_projection = node.target in (LINEAR, ops.linear)
    return node if is_projection and len(node.users) == 1 else None
