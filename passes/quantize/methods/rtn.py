"""Rounding to nearest: the baseline of all methods."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.passes.quantize.methods.base import Method, Outcome, Task


@dataclass(frozen=True)
class Rtn(Method):
    """Each weight becomes the nearest value that its format can store."""

    def quantize(self, task: Task) -> Outcome:
        """Rounds; see `Format.encode`."""
        return Outcome(
            task.format.encode(task.weight, scale_search=task.scale_search, name=task.name)
        )
