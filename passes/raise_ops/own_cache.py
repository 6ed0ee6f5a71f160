"""The compiler takes over the key/value cache."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Role
from qcompile.passes.infra import Context, Exact, Pass, PassResult, Skip

aten = torch.ops.aten


class OwnCache(Pass):
    """Makes every growing cache explicit.

    1. ``cat([past, new], -2)`` with an input `past` of a cache role  =>  ``kv_append(past, new)``
    2. sizes read from a cache input  =>  sizes of the ids and the mask, so that a target may keep
       the cache in a larger buffer than the positions that it holds
    """

    requires = frozenset({Fact.CANONICAL})
    ensures = frozenset({Fact.CACHE_OWNED})
    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites all layers; a cache that is used otherwise is reported."""
        del context
        result = PassResult()
        editor = Editor(program)
        caches = _cache_inputs(program)
        for node in program.calls(aten.cat.default):
            operands = list(node.args[0])  # type: ignore[arg-type]
            if len(operands) == 2 and operands[0] in caches and _is_sequence_axis(node):
                with editor.before(node):
                    editor.replace(node, editor.call(dialect.kv_append, *operands))
                result.rewrites += 1
        result.rewrites += _resize(program, editor, caches)
        for cache in caches:
            for user in cache.users:
                if user.target is not dialect.kv_append:
                    result.skips.append(
                        Skip(str(cache.target), f"the cache is also read by '{user.name}'")
                    )
        return result


def _cache_inputs(program: Program) -> set[fx.Node]:
    return {
        node
        for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        if port.role in (Role.PAST_KEY, Role.PAST_VALUE)
    }


def _is_sequence_axis(node: fx.Node) -> bool:
    axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return axis in (-2, 2)


def _resize(program: Program, editor: Editor, caches: set[fx.Node]) -> int:
    """Batch and past, where they are read from a cache, come from the ids and the mask."""
    inputs = {
        port.role: node for node, port in zip(program.inputs, program.signature.inputs, strict=True)
    }
    mask, ids = inputs.get(Role.ATTENTION_MASK), inputs.get(Role.INPUT_IDS)
    if mask is None or ids is None:
        return 0
    changed = 0
    for node in program.calls(aten.sym_size.int):
        if node.args[0] not in caches or node.args[1] not in (0, 2):
            continue
        with editor.before(node):
            if node.args[1] == 0:
                new = editor.call(aten.sym_size.int, ids, 0)
            else:
                total = editor.call(aten.sym_size.int, mask, 1)
                query = editor.call(aten.sym_size.int, ids, 1)
                new = editor.call(operator.sub, total, query)
        editor.replace(node, new)
        changed += 1
    return changed
