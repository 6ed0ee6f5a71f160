"""Routed experts as two operators, so that all that their weights read is a value."""

from __future__ import annotations

from torch import fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program


def split_experts(program: Program) -> Program:
    """The same program with every `qc.experts` in two, as `split_call` does it.

    Args:
        program: It is not changed; the result shares its weights.

    Returns:
        A copy, or the program itself if it has no experts.
    """
    if not any(True for _ in program.calls(dialect.experts)):
        return program
    split = program.copy()
    editor = Editor(split)
    for call in list(split.calls(dialect.experts)):
        split_call(editor, call)
    return split


def split_call(editor: Editor, call: fx.Node) -> None:
    """Puts two operators in the place of a `qc.experts`.

    Before::

        %1 = qc.experts(%x, %index, %weight, @up, None, @down, None, silu, True, 0, 0)

    After::

        %1 = qc.expert_hidden(%x, %index, @up, None, silu, True, 0, 0)
        %2 = qc.expert_output(%1, %index, %weight, @down, None)
    """
    x, index, weight, up, up_bias, down, down_bias, *gate = call.args
    with editor.before(call):
        hidden = editor.call(dialect.expert_hidden, x, index, up, up_bias, *gate)
        output = editor.call(dialect.expert_output, hidden, index, weight, down, down_bias)
    editor.replace(call, output)
