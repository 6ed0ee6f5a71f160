"""Logits only for the positions that somebody will read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Port, Role
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult
from qcompile.passes.quantize.layers import LINEAR


class LimitLogits(Pass):
    """``linear(x, head)``  =>  ``linear(index_select(x, 1, logit_positions), head)``.

    `logit_positions` is a new input, ``[n]`` int64: the last position while generating, all of
    them for an evaluation. The projection to the vocabulary is the largest layer of many models;
    a long prompt needs its last row only.

    Args:
        projections: Operators that a target has put in the place of `aten.linear` so far; their
            first operand is the input.
    """

    ensures = frozenset({Fact.LOWERED})
    numerics = Equivalent()

    def __init__(self, projections: Iterable[Any] = ()) -> None:
        self.projections = frozenset({LINEAR, *projections})

    def run(self, program: Program, context: Context) -> PassResult:
        """Applies to programs that return logits and keep a cache."""
        del context
        result = PassResult()
        if not program.signature.is_causal_lm:
            return result
        head = _head(program, self.projections)
        if head is None:
            return result
        editor = Editor(program)
        x = head.args[0]
        assert isinstance(x, torch.fx.Node)
        with editor.after(program.inputs[-1]):
            positions = program.graph.placeholder(Role.LOGIT_POSITIONS.value)
        positions.meta["val"] = _vector_of_any_length(program)
        with editor.before(head):
            chosen = editor.call(torch.ops.aten.index_select.default, x, 1, positions)
            head.update_arg(0, chosen)
        _update_shapes(editor, head)
        port = Port(Role.LOGIT_POSITIONS.value, Role.LOGIT_POSITIONS)
        program.signature = replace(program.signature, inputs=(*program.signature.inputs, port))
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


def _head(program: Program, projections: frozenset[Any]) -> torch.fx.Node | None:
    """The projection behind the logits, if nothing between them mixes positions."""
    node = program.results[0]
    while node.target in _POSITIONWISE and len(node.all_input_nodes) == 1 and len(node.users) == 1:
        node = node.all_input_nodes[0]
    is_projection = node.target in projections
    return node if is_projection and len(node.users) == 1 else None


def _vector_of_any_length(program: Program) -> torch.Tensor:
    """A fake int64 vector whose length is a symbol of its own."""
    mode = program.fake_mode
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    example = torch.empty(_EXAMPLE_LENGTH, dtype=torch.int64, device="meta")
    return mode.from_tensor(
        example, symbolic_context=context, source=ConstantSource(Role.LOGIT_POSITIONS.value)
    )


_EXAMPLE_LENGTH = 19
"""Not 0 or 1, which would be taken for constants, nor a size that anything else may have."""


def _update_shapes(editor: Editor, head: torch.fx.Node) -> None:
    """The projection and what follows it have as many rows as there are positions."""
    node = head
    while node.op != "output":
        node.meta["val"] = editor.infer(node)
        (node,) = node.users
