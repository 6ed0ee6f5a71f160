"""What a pass is, and the manager that runs passes in order.

The manager checks that every pass will find the facts that it requires before anything runs. Then,
pass by pass: it edits a copy, verifies it, has the equivalence checked where a checker is given,
records what happened, and goes back to the program before if the pass broke it. Once per phase, the
programs before and after the phase are compared as a whole.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from qcompile.errors import EquivalenceError, QCompileError
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.verify import MalformedProgramError
from qcompile.progress import NullProgress, Progress


@dataclass(frozen=True)
class Exact:
    """The pass changes no bit of any result."""


@dataclass(frozen=True)
class Equivalent:
    """The pass keeps the function in real arithmetic.

    Attributes:
        tolerance: Bound on max |difference| / max |reference| in float64.
    """

    tolerance: float = 1e-10


@dataclass(frozen=True)
class Lossy:
    """The pass changes the function on purpose (it rounds)."""


Numerics = Exact | Equivalent | Lossy


@dataclass(frozen=True)
class Skip:
    """A place where a pass did not apply, and why.

    Attributes:
        node: The node, or the weight, by name.
        reason: One clause.
    """

    node: str
    reason: str


@dataclass
class PassResult:
    """What a pass did.

    Attributes:
        rewrites: How many places it changed.
        skips: Where it might have been expected to apply and did not.
        details: Facts for the report, one mapping per place (layer, format, error, ...).
    """

    rewrites: int = 0
    skips: list[Skip] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)

    @property
    def modified(self) -> bool:
        """Whether the program changed."""
        return self.rewrites > 0


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


@dataclass
class PassRecord:
    """One line of the report.

    Attributes:
        name: The pass.
        phase: The phase it ran in.
        seconds: Time in the pass itself.
        check_seconds: Time spent verifying and checking equivalence.
        result: What it did.
        error: Largest relative difference that a check saw, or None if none was run.
        nodes: Nodes in the graph afterwards.
    """

    name: str
    phase: str
    seconds: float
    check_seconds: float
    result: PassResult
    error: float | None
    nodes: int


@dataclass(frozen=True)
class Phase:
    """A named run of passes; equivalence in lockstep is checked once at its end."""

    name: str
    passes: tuple[Pass, ...]


@dataclass(frozen=True)
class PhaseCheck:
    """What comparing the programs before and after a phase found.

    Attributes:
        error: The largest relative difference; None if there was nothing to compare.
        peak_weight_bytes: The most bytes of weights that the comparison held at a time.
        skipped: Why there was nothing to compare, one clause; empty if there was.
    """

    error: float | None
    peak_weight_bytes: int
    skipped: str = ""


Checker = Callable[[Program, Program, Pass], float | None]
"""Compares the programs before and after a pass: the largest relative difference, or None if it
has nothing to check. Raises `EquivalenceError` if the pass broke its promise."""

PhaseChecker = Callable[[Program, Program, Phase], PhaseCheck]
"""Compares the programs before and after a phase. Raises `EquivalenceError` if they differ."""


@dataclass(frozen=True)
class Checks:
    """How equivalence is checked; None checks structure only.

    Attributes:
        each_pass: Called after every pass that changed something.
        each_phase: Called after every phase that changed something.
    """

    each_pass: Checker | None = None
    each_phase: PhaseChecker | None = None


@dataclass
class PhaseRecord:
    """What happened in a phase.

    Attributes:
        name: The phase.
        passes: Its passes, in order.
        check_seconds: Time spent comparing the programs before and after it, as a whole.
        check: What that found, or None if it was not asked for.
    """

    name: str
    passes: list[PassRecord] = field(default_factory=list)
    check_seconds: float = 0.0
    check: PhaseCheck | None = None

    @property
    def seconds(self) -> float:
        """Time spent in the phase, checks included."""
        of_passes = sum(record.seconds + record.check_seconds for record in self.passes)
        return of_passes + self.check_seconds


@dataclass
class Context:
    """What the passes of one compilation share.

    Attributes:
        progress: Told of stages and steps.
        seed: For everything random.
        checks: How equivalence is checked, unless a manager is told otherwise.
        phases: The phases that have run, in order; managers add to it.
    """

    progress: Progress = field(default_factory=NullProgress)
    seed: int = 0
    checks: Checks = field(default_factory=Checks)
    phases: list[PhaseRecord] = field(default_factory=list)


class PassManager:
    """Runs phases of passes over a program.

    Args:
        phases: In order; or a plain sequence of passes, which makes one phase.
        checker: Compares before and after each pass; by default what the context says.
        phase_checker: Compares before and after each phase; by default what the context says.
        on_phase: Called with each phase's name and the program after it, for dumps.
    """

    def __init__(
        self,
        phases: Sequence[Phase] | Sequence[Pass],
        *,
        checker: Checker | None = None,
        phase_checker: PhaseChecker | None = None,
        on_phase: Callable[[str, Program], None] | None = None,
    ) -> None:
        self.phases = [
            item if isinstance(item, Phase) else Phase(item.name, (item,)) for item in phases
        ]
        self._given = Checks(checker, phase_checker)
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
        for phase in self.phases:
            program, record = self._run_phase(phase, program, context)
            context.phases.append(record)
            records += record.passes
            if self._on_phase is not None:
                self._on_phase(phase.name, program)
        return program, records

    def _run_phase(
        self, phase: Phase, program: Program, context: Context
    ) -> tuple[Program, PhaseRecord]:
        record = PhaseRecord(phase.name)
        programs = [program]
        for item in phase.passes:
            program, done = self._run_one(phase, item, program, context)
            record.passes.append(done)
            programs.append(program)
        check = self._given.each_phase or context.checks.each_phase
        if check is not None and any(done.result.modified for done in record.passes):
            started = time.perf_counter()
            record.check = _check_phase(check, phase, programs)
            record.check_seconds = time.perf_counter() - started
        return program, record

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
        error = _check(checker, item, before, after) if result.modified else None
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


def _check(checker: Checker | None, item: Pass, before: Program, after: Program) -> float | None:
    try:
        after.verify()
        return checker(before, after, item) if checker is not None else None
    except MalformedProgramError as error:
        raise MalformedProgramError(f"pass '{item.name}': {error.message}") from error
    except EquivalenceError as error:
        raise EquivalenceError(f"pass '{item.name}': {error.message}") from error


def _check_phase(check: PhaseChecker, phase: Phase, programs: Sequence[Program]) -> PhaseCheck:
    """Compares the first and the last of the programs that the passes of a phase made.

    Raises:
        EquivalenceError: Names the pass: the first whose own step does not hold.
    """
    try:
        return check(programs[0], programs[-1], phase)
    except EquivalenceError as error:
        for item, step in zip(phase.passes, pairwise(programs), strict=True):
            _check_step(check, phase, item, *step)
        raise EquivalenceError(f"phase '{phase.name}': {error.message}") from error


def _check_step(
    check: PhaseChecker, phase: Phase, item: Pass, before: Program, after: Program
) -> None:
    try:
        check(before, after, Phase(phase.name, (item,)))
    except EquivalenceError as error:
        raise EquivalenceError(
            f"pass '{item.name}' (phase '{phase.name}'): {error.message}"
        ) from error


def run_passes(program: Program, passes: Sequence[Pass]) -> Program:
    """The program after the given passes, each verified; `program` itself is not changed.

    Raises:
        QCompileError: As `PassManager.run`.
    """
    return PassManager(passes).run(program)[0]
