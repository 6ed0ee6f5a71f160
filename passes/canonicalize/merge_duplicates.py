"""Common subexpression elimination."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult

_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal")


class MergeDuplicates(Pass):
    """Two calls of one operator with equal arguments become one; so do two reads of one weight."""

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Merges in graph order, so that merging cascades."""
        del context
        result = PassResult()
        seen: dict[Any, fx.Node] = {}
        for node in list(program.graph.nodes):
            if node.op not in ("call_function", "get_attr") or _is_random(node):
                continue
            key = (node.op, node.target, _freeze(node.args), _freeze(node.kwargs))
            first = seen.setdefault(key, node)
            if first is not node:
                node.replace_all_uses_with(first)
                program.graph.erase_node(node)
                result.rewrites += 1
        return result


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _freeze(item)) for key, item in value.items()))
    return (type(value), value)


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        word in target._schema.name for word in _RANDOM
    )
