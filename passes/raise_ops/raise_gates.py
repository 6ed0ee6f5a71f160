"""Gated activations as one operator each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.types import Fact
from qcompile.passes.rule import ApplyRules, Const, Match, Rule

aten = torch.ops.aten


class RaiseGates(ApplyRules):
    """Makes the middle of every gated feed-forward block one operator."""

    requires = frozenset({Fact.CANONICAL})

    def __init__(self) -> None:
        super().__init__((RaiseGate(),), report_misses=False)


class RaiseGate(Rule):
    """``mul(act(gate), up)``  =>  ``qc.gated_act(gate, up, kind)``."""

    def pattern(self, gate: Tensor, up: Tensor, kind: Const) -> Any:
        """A product with an activated value."""
        return aten.mul.Tensor(dialect.act(gate, kind), up)

    def check(self, match: Match) -> str | None:
        """Both must be activations of one shape."""
        if str(match.value("gate").shape) != str(match.value("up").shape):
            return "gate and value have different shapes"
        if match.node("up").op == "get_attr":
            return "what is gated is a weight"
        return None

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        """The gate."""
        return edit.call(dialect.gated_act, match["gate"], match["up"], match["kind"])
