"""The sum with the residual stream goes into the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.cpu import ops
from qcompile.ir.edit import Editor
from qcompile.passes.rule import ApplyRules, Const, Match, Rule

aten = torch.ops.aten


class FuseResidual(ApplyRules):
    """Lets the library's linear layers add the residual stream themselves."""

    def __init__(self) -> None:
        super().__init__((TakeResidual(),), report_misses=False)


class TakeResidual(Rule):
    """``add(residual, cpu_linear(x, W, b))``  =>  ``cpu_linear(x, W, b, residual)``."""

    def pattern(
        self,
        x: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        n: Const,
        k: Const,
        layout: Const,
        act: Const,
        grid: Tensor | None,
    ) -> Any:
        """A layer that adds nothing yet, in a sum."""
        return aten.add.Tensor(ops.linear(x, packed, bias, None, n, k, layout, act, grid), residual)

    def check(self, match: Match) -> str | None:
        """The kernel adds values of its own shape only."""
        if str(match.value("residual").shape) != str(match.outputs[0].meta["val"].shape):
            return "what is added is broadcast"
        x, residual = match.value("x").shape, match.value("residual").shape
        return None if str(x[:-1]) == str(residual[:-1]) else "the sum is broadcast"

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The layer with its residual."""
        names = ("x", "packed", "bias", "residual", "n", "k", "layout", "act")
        arguments = [match[name] for name in names]
        grid = match["grid"]
        return edit.call(ops.linear, *arguments, *([] if grid is None else [grid]))
