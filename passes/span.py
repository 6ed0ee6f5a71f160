"""Comparing whole programs, once for all the phases in a row that keep the function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompile.errors import EquivalenceError
from qcompile.ir.program import Program
from qcompile.passes.blame import blame_rewrite
from qcompile.passes.records import Lossy, PhaseCheck, PhaseRecord

if TYPE_CHECKING:
    from qcompile.passes.infra import Context, Pass

SpanChecker = Callable[[Program, Program, "Sequence[Pass]"], PhaseCheck]
"""Compares the programs before and after passes. Raises `EquivalenceError` if they differ."""


@dataclass(frozen=True)
class Step:
    """A pass that changed a program.

    Attributes:
        record: Of the phase that it belongs to.
        item: The pass.
        before: The program that it was given.
        after: What it made of it.
    """

    record: PhaseRecord
    item: Pass
    before: Program
    after: Program


class Span:
    """Phases in a row that keep the function.

    A comparison runs the whole model, so there is one for all of them. A phase that rounds is a
    span by itself.
    """

    def __init__(self, check: SpanChecker | None, context: Context) -> None:
        self._check = check
        self._context = context
        self._steps: list[Step] = []

    def add(self, steps: Sequence[Step]) -> None:
        """Adds the passes of a phase that changed something.

        Raises:
            EquivalenceError: See `close`.
        """
        rounds = any(isinstance(step.item.numerics, Lossy) for step in steps)
        if rounds:
            self.close()
        self._steps += steps
        if rounds:
            self.close()

    def close(self) -> None:
        """Compares the programs before and after, and begins anew.

        Raises:
            EquivalenceError: Names the pass: the first whose own step does not hold.
        """
        steps, self._steps = self._steps, []
        if self._check is None or not steps:
            return
        started = time.perf_counter()
        last = steps[-1].record
        last.check = self._compare(self._check, steps)
        last.check_seconds = time.perf_counter() - started
        for step in steps:
            if step.record is not last:
                step.record.check = PhaseCheck(None, 0, f"compared together with '{last.name}'")

    def _compare(self, check: SpanChecker, steps: Sequence[Step]) -> PhaseCheck:
        try:
            return check(steps[0].before, steps[-1].after, [step.item for step in steps])
        except EquivalenceError as error:
            for step in steps:
                self._blame(check, step)
            phases = dict.fromkeys(f"'{step.record.name}'" for step in steps)
            raise EquivalenceError(f"phase {', '.join(phases)}: {error.message}") from error

    def _blame(self, check: SpanChecker, step: Step) -> None:
        try:
            check(step.before, step.after, [step.item])
        except EquivalenceError as error:
            rewrite = blame_rewrite(
                step.item,
                step.before,
                self._context,
                lambda made: check(step.before, made, [step.item]),
            )
            raise EquivalenceError(
                f"pass '{step.item.name}' (phase '{step.record.name}'): {rewrite}{error.message}"
            ) from error
