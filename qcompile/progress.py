"""How long work tells what it is doing: a small protocol that any display can implement."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A listener to the stages of a long task.

    The task calls `stage` when it begins one, `advance` as units of it complete and `done` once,
    after the last stage. Calls come from one thread and must be cheap: they happen inside loops.
    """

    def stage(self, name: str, total: int | None = None) -> None:
        """Begins a stage, which ends the one before it.

        Args:
            name: What the stage does, in a few words, such as ``"quantize weights"``.
            total: How many units (tensors, windows, files) it has, when that is known.
        """

    def advance(self, n: int = 1, detail: str = "") -> None:
        """Reports ``n`` more units of the current stage, and what was just worked on."""

    def done(self) -> None:
        """Ends the last stage."""


class NullProgress:
    """The listener of library calls and pipes: it says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignores the stage."""

    def advance(self, n: int = 1, detail: str = "") -> None:
        """Ignores the units."""

    def done(self) -> None:
        """Ignores the end."""
