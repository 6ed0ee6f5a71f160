"""What a pass promises, and what passes and their checks report: plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
class PhaseCheck:
    """What comparing the programs before and after a phase, or several in a row, found.

    Attributes:
        error: The largest relative difference; None if nothing was compared.
        peak_weight_bytes: The most bytes of weights that the comparison held at a time.
        skipped: Why nothing was compared, one clause; empty if it was.
    """

    error: float | None
    peak_weight_bytes: int
    skipped: str = ""


@dataclass
class PhaseRecord:
    """What happened in a phase.

    Attributes:
        name: The phase.
        passes: Its passes, in order.
        check_seconds: Time spent comparing the programs before and after the span that it ends.
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
