"""One node per symbolic size."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Exact, Pass, PassResult


class MergeSizes(Pass):
    """Sizes that are equal for all values of the symbols become one node, the first of them.

    1. ``sym_size(f(x), 0)`` where the batch is known already  =>  the size that is there
    2. a size that is a number after all                        =>  the number
    """

    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Merges in graph order, so that sizes of inputs come first."""
        del context
        result = PassResult()
        first: dict[sympy.Expr, fx.Node] = {}
        for node in program.calls():
            size = node.meta["val"]
            if isinstance(size, int) and not isinstance(size, bool):
                node.replace_all_uses_with(size)  # type: ignore[arg-type]
            elif isinstance(size, torch.SymInt):
                known = first.setdefault(sympy.expand(size.node.expr), node)
                if known is node:
                    continue
                node.replace_all_uses_with(known)
            else:
                continue
            program.graph.erase_node(node)
            result.rewrites += 1
        return result
