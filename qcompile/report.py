"""What a compilation did, pass by pass, for people and for `report.json`."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompile.passes.infra import PassRecord


@dataclass
class CompileReport:
    """Facts of one compilation that may differ between two equal ones, and every pass's record.

    Attributes:
        seconds: Wall-clock time by phase, in order.
        passes: One record per pass, in order.
        notes: What the front end and the passes want the user to know.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "total_seconds": round(sum(self.seconds.values()), 3),
            "peak_memory_bytes": peak_memory_bytes(),
            "passes": [_pass_to_dict(record) for record in self.passes],
            "notes": list(self.notes),
        }


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
