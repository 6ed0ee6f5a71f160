"""The end of raising: what was not recognized is named."""

from __future__ import annotations

import torch

from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, Exact, Pass, PassResult, Skip
from qcompile.passes.raise_ops.regions import REASON

aten = torch.ops.aten

BARRIERS = {
    aten.softmax.int: "a softmax that is no attention",
    aten.scaled_dot_product_attention.default: "attention that could not be raised",
    aten.rsqrt.default: "an inverse root that is no normalization",
}
"""Operators that raising should have consumed, and what it means when they are left.

A pass that tried and failed says more in the node's ``meta[REASON]``."""


class Settle(Pass):
    """Establishes that the program is raised, and reports every barrier that is left."""

    ensures = frozenset({Fact.RAISED})
    numerics = Exact()

    def run(self, program: Program, context: Context) -> PassResult:
        """Changes nothing."""
        del context
        skips = [
            Skip(node.name, node.meta.get(REASON, BARRIERS[node.target]))  # type: ignore[index]
            for node in program.calls(*BARRIERS)
        ]
        return PassResult(skips=skips)
