"""Caches of few bits become bytes, as the model is given them and gives them back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from qcompile.ir import dialect
from qcompile.ir.caches import CacheFormat, cache_format
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Role
from qcompile.passes.infra import Context, Lossy, Pass, PassResult

FormatsOf = Callable[[fx.Node], Iterable[tuple[fx.Node, CacheFormat]]]
"""The caches that a call takes as floats or as rows, and what they keep."""


class StoreCaches(Pass):
    """Makes inputs and outputs of caches what they hold: rows of bytes.

    Before::

        %1: f32[s0, 2, s1 + s2, 8] = qc.kv_append(%past: f32[s0, 2, s1, 8], %0, int8, 0)
        %2 = qc.attention(%q, %1, ...)
        return %2, %1

    After::

        %1: u8[s0, 2, s2, 11] = qc.kv_encode(%0, int8, 0)
        %2: u8[s0, 2, s1 + s2, 11] = qc.kv_append(%past: u8[s0, 2, s1, 11], %1)
        %3: f32[s0, 2, s1 + s2, 8] = qc.kv_decode(%2, int8, 0, 8)
        %4 = qc.attention(%q, %3, ...)
        return %4, %2

    What the model computes stays the same. It has no float64 form any more, and takes other inputs:
    so this stands behind all passes that are checked.

    Args:
        operators: Calls of a target that append for themselves.
    """

    numerics = Lossy()

    def __init__(self, operators: Mapping[Any, FormatsOf] | None = None) -> None:
        self._operators = dict(operators or {})

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every cache that rounds."""
        del context
        result = PassResult()
        editor = Editor(program)
        caches = {
            node
            for node, port in zip(program.inputs, program.signature.inputs, strict=True)
            if port.role in (Role.PAST_KEY, Role.PAST_VALUE)
        }
        for append in list(program.calls(dialect.kv_append)):
            format = cache_format(append)
            if format.rounds and append.args[0] in caches:
                _store(editor, append, format)
                result.rewrites += 1
        for target, formats_of in self._operators.items():
            for node in list(program.calls(target)):
                for past, format in formats_of(node):
                    _hold_rows(program, past, format)
                node.meta["val"] = editor.infer(node)
                for user in node.users:
                    user.meta["val"] = editor.infer(user)
                result.rewrites += 1
        return result


def _store(editor: Editor, append: fx.Node, format: CacheFormat) -> None:
    past, new = append.args[:2]
    assert isinstance(past, fx.Node)
    width = int(append.meta["val"].shape[-1])
    _hold_rows(editor.program, past, format)
    with editor.before(append):
        rows = editor.call(dialect.kv_encode, new, format.name, format.group_size)
        grown = editor.call(dialect.kv_append, past, rows)
        decoded = editor.call(dialect.kv_decode, grown, format.name, format.group_size, width)
    for user in list(append.users):
        user.replace_input_with(append, grown if user.op == "output" else decoded)
    editor.graph.erase_node(append)


def _hold_rows(program: Program, past: fx.Node, format: CacheFormat) -> None:
    """Gives an input the shape and type of what it holds."""
    fake = past.meta["val"]
    if fake.dtype == torch.uint8:
        return
    shape = (*fake.shape[:-1], format.row_bytes(int(fake.shape[-1])))
    with program.fake_mode:
        past.meta["val"] = torch.empty(shape, dtype=torch.uint8, device="meta")
