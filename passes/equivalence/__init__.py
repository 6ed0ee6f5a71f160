"""Checked equivalence: what a pass promises about results is measured, in float64.

After each pass, `LocalChecker` proves the places that it changed. After all the phases in a row
that keep the function, `lockstep` runs the program before them and the one after side by side.
"""

from __future__ import annotations

from qcompile.passes.equivalence.checkers import (
    CHECK_LEVELS,
    CheckLevel,
    LocalChecker,
    LockstepChecker,
    checks_for,
)
from qcompile.passes.equivalence.local import LocalProof, prove_locally
from qcompile.passes.equivalence.lockstep import Agreement, Through, lockstep

__all__ = [
    "CHECK_LEVELS",
    "Agreement",
    "CheckLevel",
    "LocalChecker",
    "LocalProof",
    "LockstepChecker",
    "Through",
    "checks_for",
    "lockstep",
    "prove_locally",
]
