"""What a pass is, and the manager that runs passes in order.

The manager checks that every pass will find the facts that it requires before anything runs. Then,
pass by pass: it edits a copy, verifies it, has the equivalence checked where a checker is given,
records what happened, and goes back to the program before if the pass broke it. Phases in a row
that keep the function are a span: the programs before and after it are compared as a whole, once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from qcompile.calibration.settings import Calibration
from qcompile.errors import EquivalenceError, QCompileError
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.verify import MalformedProgramError
from qcompile.passes.blame import blame_rewrite
from qcompile.passes.records import (
    Equivalent,
    Exact,
    Lossy,
    Numerics,
    PassRecord,
    PassResult,
    PhaseCheck,
    PhaseRecord,
    Skip,
)
from qcompile.passes.span import Span, SpanChecker, Step
from qcompile.progress import NullProgress, Progress

if TYPE_CHECKING:
    from qcompile.passes.rule import Rewrite

__all__ = [
    "Checker",
    "Checks",
    "Context",
    "Equivalent",
    "Exact",
    "Lossy",
    "Numerics",
    "Pass",
    "PassManager",
    "PassRecord",
    "PassResult",
    "Phase",
    "PhaseCheck",
    "PhaseRecord",
    "Skip",
    "SpanChecker",
    "run_passes",
]


class Pass(ABC):
    """A rewrite of a whole program.

    Subclasses edit the program that they are given; the manager keeps the one before.

    Attributes:
        requires: Facts that must hold before.
        ensures: Facts that hold after.
        invalidates: Facts that may no longer hold after.
        numerics: What it promises about results.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset()
    ensures: ClassVar[frozenset[Fact]] = frozenset()
    invalidates: ClassVar[frozenset[Fact]] = frozenset()
    numerics: ClassVar[Numerics] = Equivalent()

    @property
    def name(self) -> str:
        """The class name in snake case."""
        return "".join(
            f"_{letter.lower()}" if letter.isupper() else letter for letter in type(self).__name__
        ).lstrip("_")

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Edits `program` and says what was done."""


@dataclass(frozen=True)
class Phase:
    """A named run of passes."""

    name: str
    passes: tuple[Pass, ...]


Checker = Callable[[Program, Program, Pass], float | None]
"""Compares the programs before and after a pass: the largest relative difference, or None if it
has nothing to check. Raises `EquivalenceError` if the pass broke its promise."""


@dataclass(frozen=True)
class Checks:
    """How equivalence is checked; None checks structure only.

    Attributes:
        each_pass: Called after every pass that changed something.
        each_span: Called after phases in a row that keep the function, if they changed anything.
    """

    each_pass: Checker | None = None
    each_span: SpanChecker | None = None


@dataclass
class Context:
    """What the passes of one compilation share.

    Attributes:
        progress: Told of stages and steps.
        seed: For everything random.
        calibration: What passes that look at activations run the program on.
        checks: How equivalence is checked, unless a manager is told otherwise.
        phases: The phases that have run, in order; managers add to it.
        on_rewrite: Told of every rewrite of a rule, before it takes its place in the program.
    """

    progress: Progress = field(default_factory=NullProgress)
    seed: int = 0
    calibration: Calibration = field(default_factory=Calibration)
    checks: Checks = field(default_factory=Checks)
    phases: list[PhaseRecord] = field(default_factory=list)
    on_rewrite: Callable[[Rewrite], None] | None = None


class PassManager:
    """Runs phases of passes over a program.

    Args:
        phases: In order; or a plain sequence of passes, which makes one phase.
        checker: Compares before and after each pass; by default what the context says.
        span_checker: Compares before and after each span; by default what the context says.
        on_phase: Called with each phase's name and the program after it, for dumps.
    """

    def __init__(
        self,
        phases: Sequence[Phase] | Sequence[Pass],
        *,
        checker: Checker | None = None,
        span_checker: SpanChecker | None = None,
        on_phase: Callable[[str, Program], None] | None = None,
    ) -> None:
        self.phases = [
            item if isinstance(item, Phase) else Phase(item.name, (item,)) for item in phases
        ]
        self._given = Checks(checker, span_checker)
        self._on_phase = on_phase

    def insert_before(self, name: str, *new: Pass) -> None:
        """Puts passes right before the first pass called `name`.

        Raises:
            QCompileError: If there is no such pass.
        """
        self._insert(name, new, offset=0)

    def insert_after(self, name: str, *new: Pass) -> None:
        """Puts passes right after the last pass called `name`.

        Raises:
            QCompileError: If there is no such pass.
        """
        self._insert(name, new, offset=1)

    def check_facts(self, facts: Iterable[Fact]) -> None:
        """Walks the facts through the pipeline without running it.

        Raises:
            QCompileError: Names the first pass whose requirements would not be met.
        """
        known = set(facts)
        for phase in self.phases:
            for item in phase.passes:
                missing = item.requires - known
                if missing:
                    names = ", ".join(sorted(fact.value for fact in missing))
                    raise QCompileError(
                        f"pass '{item.name}' (phase '{phase.name}') needs a program that is "
                        f"{names}",
                        remedy="put it after the pass that ensures this",
                    )
                known = (known - item.invalidates) | item.ensures

    def run(
        self, program: Program, context: Context | None = None
    ) -> tuple[Program, list[PassRecord]]:
        """The program after all passes, and a record of each; `program` itself is not changed.

        Raises:
            QCompileError: If facts are missing, or a pass fails or breaks its promise; the error
                names the pass.
        """
        context = context or Context()
        self.check_facts(program.facts)
        records = []
        span = Span(self._given.each_span or context.checks.each_span, context)
        for phase in self.phases:
            record = PhaseRecord(phase.name)
            steps = []
            for item in phase.passes:
                before = program
                program, done = self._run_one(phase, item, before, context)
                record.passes.append(done)
                if done.result.modified:
                    steps.append(Step(record, item, before, program))
            span.add(steps)
            context.phases.append(record)
            records += record.passes
            if self._on_phase is not None:
                self._on_phase(phase.name, program)
        span.close()
        return program, records

    def _run_one(
        self, phase: Phase, item: Pass, before: Program, context: Context
    ) -> tuple[Program, PassRecord]:
        after = before.copy()
        started = time.perf_counter()
        result = item.run(after, context)
        after.tidy()
        after.facts = (after.facts - item.invalidates) | item.ensures
        finished = time.perf_counter()
        checker = self._given.each_pass or context.checks.each_pass
        error = _check(checker, item, before, after, context) if result.modified else None
        checked = time.perf_counter()
        record = PassRecord(
            item.name,
            phase.name,
            finished - started,
            checked - finished,
            result,
            error,
            len(after.graph.nodes),
        )
        return after, record

    def _insert(self, name: str, new: tuple[Pass, ...], offset: int) -> None:
        places = [
            (i, j)
            for i, phase in enumerate(self.phases)
            for j, item in enumerate(phase.passes)
            if item.name == name
        ]
        if not places:
            known = ", ".join(item.name for phase in self.phases for item in phase.passes)
            raise QCompileError(f"no pass is called '{name}'", remedy=f"known passes: {known}")
        i, j = places[-1] if offset else places[0]
        phase = self.phases[i]
        passes = (*phase.passes[: j + offset], *new, *phase.passes[j + offset :])
        self.phases[i] = Phase(phase.name, passes)


def _check(
    checker: Checker | None, item: Pass, before: Program, after: Program, context: Context
) -> float | None:
    try:
        after.verify()
        return checker(before, after, item) if checker is not None else None
    except MalformedProgramError as error:
        raise MalformedProgramError(f"pass '{item.name}': {error.message}") from error
    except EquivalenceError as error:
        assert checker is not None
        rewrite = blame_rewrite(item, before, context, lambda made: checker(before, made, item))
        raise EquivalenceError(f"pass '{item.name}': {rewrite}{error.message}") from error


def run_passes(program: Program, passes: Sequence[Pass]) -> Program:
    """The program after the given passes, each verified; `program` itself is not changed.

    Raises:
        QCompileError: As `PassManager.run`.
    """
    return PassManager(passes).run(program)[0]
