"""A program on some data, run again from where a weight stands with other numbers in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.analysis.stages import stages
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Role

_ROWS = 256
"""Positions whose probabilities are held at a time."""


@dataclass(frozen=True)
class Change:
    """What became of a program's predictions.

    Attributes:
        divergence: Mean KL(before || after) per position, in nats; of programs without logits, the
            mean squared error of their first result over its mean square.
        surprise: Mean increase of the negative log-likelihood of the next token, in nats; None for
            programs that predict none.
    """

    divergence: float
    surprise: float | None


class Probe:
    """Runs a program on one batch, and again with changed weights.

    What stages compute without changes is kept, so that a run begins where the first changed weight
    is read. Weights are kept in memory as an `Interpreter` keeps them.

    Args:
        program: It is not changed, and may not be while the probe is in use.
        inputs: One tensor per placeholder.
    """

    def __init__(self, program: Program, inputs: Sequence[Tensor]) -> None:
        self._program = program
        self._inputs = list(inputs)
        self._weights: dict[str, Tensor] = {}
        self._result, self._predicts = _result_of(program)
        self._needed = _ancestors(self._result)
        self._order = [node for node in program.graph.nodes if node.op != "output"]
        self._place = {node: i for i, node in enumerate(self._order)}
        self._starts = self._find_starts()
        self._kept: dict[fx.Node, Any] = {}
        self._before = self._observe(self._run(0, keep=True))

    def change(self, weights: Mapping[str, Tensor]) -> Change:
        """What other numbers in some weights do.

        Args:
            weights: By name in the weight store, float32.
        """
        readers = [n for n in self._order if n.op == "get_attr" and str(n.target) in weights]
        first = min((self._place[u] for n in readers for u in n.users), default=0)
        start = max(s for s in self._starts if s <= first)
        kept = {name: self._weights.pop(name, None) for name in weights}
        self._weights.update(weights)
        try:
            return self._compare(self._run(start))
        finally:
            for name, value in kept.items():
                del self._weights[name]
                if value is not None:
                    self._weights[name] = value

    def change_to(self, program: Program) -> Change:
        """What another program with the same inputs predicts."""
        result, _ = _result_of(program)
        outputs = Interpreter(program, cache={}).run(*self._inputs)
        return self._compare(outputs[program.results.index(result)])

    def release(self) -> None:
        """Frees what only `change` needs; `change_to` goes on working."""
        self._weights.clear()
        self._kept.clear()

    def _find_starts(self) -> list[int]:
        """Places in the graph where runs may begin: the first node of each stage."""
        firsts = [
            min(self._place[n] for n in stage.nodes if n.op != "get_attr")
            for stage in stages(self._program)
            if any(n.op != "get_attr" for n in stage.nodes)
        ]
        return sorted({0, *firsts})

    def _crossing(self) -> set[fx.Node]:
        """Values that are computed before some start and read behind it."""
        crossing = set()
        for node in self._needed:
            if node.op == "get_attr":
                continue
            readers = [self._place[u] for u in node.users if u in self._needed]
            last = max(readers, default=-1)
            if any(self._place[node] < start <= last for start in self._starts):
                crossing.add(node)
        return crossing

    def _run(self, start: int, *, keep: bool = False) -> Tensor:
        """The observed result, with everything before `start` as it was."""
        wanted = self._crossing() if keep else set()

        def hook(node: fx.Node, value: Any) -> Any:
            if node in wanted:
                self._kept[node] = value
            return value

        # What is in here is not computed: it is known, or nobody who is computed reads it.
        known = {
            node: self._kept.get(node)
            for node in self._order
            if node not in self._needed
            or (self._place[node] < start and not self._is_read_anew(node, start))
        }
        interpreter = Interpreter(self._program, cache=self._weights, hook=hook)
        placed = [v.float() if v.is_floating_point() else v for v in self._inputs]
        inputs = [v for v, n in zip(placed, self._program.inputs, strict=True) if n not in known]
        with torch.no_grad():
            outputs = fx.Interpreter.run(
                interpreter, *inputs, initial_env=known, enable_io_processing=False
            )
        result: Tensor = outputs[self._program.results.index(self._result)]
        return result

    def _is_read_anew(self, node: fx.Node, start: int) -> bool:
        """Whether it is a weight that nodes from a start on read."""
        return node.op == "get_attr" and any(self._place.get(u, 0) >= start for u in node.users)

    def _observe(self, result: Tensor) -> Tensor:
        return torch.log_softmax(result, dim=-1) if self._predicts else result

    def _compare(self, result: Tensor) -> Change:
        if not self._predicts:
            error = (result - self._before).square().sum(dtype=torch.float64)
            return Change(float(error / self._before.square().sum(dtype=torch.float64)), None)
        before = self._before.flatten(0, -2)
        divergence = 0.0
        for rows in torch.arange(len(before)).split(_ROWS):
            found = torch.log_softmax(result.flatten(0, -2)[rows], dim=-1)
            ratio = torch.where(before[rows] == -torch.inf, 0.0, before[rows] - found)
            divergence += float((before[rows].exp() * ratio).sum(dtype=torch.float64))
        return Change(max(divergence / len(before), 0.0), self._surprise(result))

    def _surprise(self, result: Tensor) -> float | None:
        roles = [port.role for port in self._program.signature.inputs]
        ids = self._inputs[roles.index(Role.INPUT_IDS)] if Role.INPUT_IDS in roles else None
        if ids is None or ids.shape != result.shape[:-1] or ids.shape[1] < 2:
            return None
        following = ids[:, 1:].unsqueeze(-1)
        after = torch.log_softmax(result[:, :-1], dim=-1).gather(-1, following)
        before = self._before[:, :-1].gather(-1, following)
        return float((before - after).mean(dtype=torch.float64))


def perplexity_factor(nats: float) -> float:
    """What a mean increase of the negative log-likelihood multiplies perplexity with."""
    return math.exp(min(nats, 700.0))


def _result_of(program: Program) -> tuple[fx.Node, bool]:
    """The result to observe, and whether it is next-token logits."""
    for port, result in zip(program.signature.outputs, program.results, strict=True):
        if port.role is Role.LOGITS:
            return result, True
    return program.results[0], False


def _ancestors(result: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting: Iterable[fx.Node] = [result]
    while waiting:
        found.update(waiting)
        waiting = {n for node in waiting for n in node.all_input_nodes} - found
    return found
