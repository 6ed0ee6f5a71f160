"""What the pass manager calls: a check after each pass, and one after each span of phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.equivalence.local import prove_locally
from qcompile.passes.equivalence.lockstep import TOLERANCE, lockstep
from qcompile.passes.infra import Checks, Equivalent, Lossy, Pass, PhaseCheck

CheckLevel = Literal["full", "local", "off"]
"""How much is checked: every pass and whole programs, every pass only, or structure only."""

_LARGEST_WEIGHT = 1 << 24
"""Elements (128 MB in float64) up to which a weight is read to check a single pass, where whole
programs are compared later anyway."""

CHECK_LEVELS: tuple[CheckLevel, ...] = ("full", "local", "off")


def checks_for(level: CheckLevel, seed: int = 0) -> Checks:
    """The checks of a level.

    Args:
        level: How much to check.
        seed: For the random inputs.

    Raises:
        RecipeError: If there is no such level.
    """
    if level not in CHECK_LEVELS:
        raise RecipeError(
            f"there is no check '{level}'", remedy=f"use one of {', '.join(CHECK_LEVELS)}"
        )
    if level == "off":
        return Checks()
    if level == "local":
        return Checks(LocalChecker(seed))
    return Checks(LocalChecker(seed, largest_weight=_LARGEST_WEIGHT), LockstepChecker(seed))


class LocalChecker:
    """Checks a pass where it changed the program.

    What cannot be shown region by region is decided by running both programs in lockstep: a pass
    is blamed only for what the program returns.

    Args:
        seed: For the random inputs.
        largest_weight: Places that read weights of more elements are left to the check of the
            phase; None leaves nothing to it.
    """

    def __init__(self, seed: int = 0, *, largest_weight: int | None = None) -> None:
        self._seed = seed
        self._largest_weight = largest_weight

    def __call__(self, before: Program, after: Program, item: Pass) -> float | None:
        """The largest relative difference found; None for passes that change the function.

        Raises:
            EquivalenceError: If the pass broke its promise; names the first node that differs.
        """
        tolerance = _tolerance(item)
        if tolerance is None:
            return None
        proof = prove_locally(
            before,
            after,
            tolerance=tolerance,
            seed=self._seed,
            largest_weight=self._largest_weight,
        )
        if proof.unproved is None:
            return proof.error
        agreement = lockstep(before, after, tolerance=tolerance, seed=self._seed)
        return agreement.error if agreement is not None else None


class LockstepChecker:
    """Checks passes in a row as a whole.

    Args:
        seed: For the random inputs.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def __call__(self, before: Program, after: Program, passes: Sequence[Pass]) -> PhaseCheck:
        """How far apart the programs before and after some passes are.

        Raises:
            EquivalenceError: If a pass broke its promise; names the first node that differs.
        """
        tolerances = [_tolerance(item) for item in passes]
        known = [tolerance for tolerance in tolerances if tolerance is not None]
        if len(known) < len(tolerances):
            return PhaseCheck(None, 0, "it rounds on purpose")
        # Kernels' references decode their weight at every call, which is most of the time here; and
        # the check of each pass has run both cases.
        is_quantized = Fact.WEIGHTS_QUANTIZED in before.facts
        agreement = lockstep(
            before,
            after,
            tolerance=max([TOLERANCE, *known]),
            seed=self._seed,
            only_last_case=is_quantized,
        )
        if agreement is None:
            return PhaseCheck(None, 0, "the program before it does not run in float64")
        return PhaseCheck(agreement.error, agreement.peak_weight_bytes)


def _tolerance(item: Pass) -> float | None:
    match item.numerics:
        case Lossy():
            return None
        case Equivalent(tolerance=tolerance):
            return tolerance
        case _:
            return 0.0
