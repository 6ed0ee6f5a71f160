"""What a compilation did, pass by pass, for people and for `report.json`."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompile.passes.infra import PassRecord, PhaseRecord


@dataclass
class CompileReport:
    """Facts of one compilation that may differ between two equal ones, and every pass's record.

    Attributes:
        seconds: Wall-clock time by phase, in order.
        phases: One record per phase, in order, with those of its passes.
        notes: What the front end and the passes want the user to know.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    phases: list[PhaseRecord] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def passes(self) -> list[PassRecord]:
        """The records of all passes, in order."""
        return [record for phase in self.phases for record in phase.passes]

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "total_seconds": round(sum(self.seconds.values()), 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "checks": {
                "seconds": round(self._check_seconds, 3),
                "phases": [_check_to_dict(record) for record in self.phases if record.check],
            },
            "passes": [_pass_to_dict(record) for record in self.passes],
            "notes": list(self.notes),
        }

    @property
    def _check_seconds(self) -> float:
        of_passes = sum(record.check_seconds for record in self.passes)
        return of_passes + sum(record.check_seconds for record in self.phases)


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def skips(records: Sequence[PassRecord]) -> list[dict[str, str]]:
    """Every place where a pass did not apply, with its reason."""
    return [
        {"pass": record.name, "node": skip.node, "reason": skip.reason}
        for record in records
        for skip in record.result.skips
    ]


def _check_to_dict(record: PhaseRecord) -> dict[str, Any]:
    check = record.check
    assert check is not None
    return {
        "phase": record.name,
        "seconds": round(record.check_seconds, 4),
        "relative_error": check.error,
        "peak_weight_bytes": check.peak_weight_bytes,
        "skipped": check.skipped,
    }


def _pass_to_dict(record: PassRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "phase": record.phase,
        "seconds": round(record.seconds, 4),
        "check_seconds": round(record.check_seconds, 4),
        "rewrites": record.result.rewrites,
        "relative_error": record.error,
        "nodes": record.nodes,
        "skips": [{"node": skip.node, "reason": skip.reason} for skip in record.result.skips],
        "details": record.result.details,
    }
