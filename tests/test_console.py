"""Progress, tables and quantities as people see them."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import Progress as RichProgress

from qcompile.console import (
    ConsoleProgress,
    print_pairs,
    seconds_text,
    show_progress,
    size_text,
)
from qcompile.progress import NullProgress


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (101_400_000, "101.4 MB"), (2e12, "2.0 TB")],
)
def test_size_is_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (0.314, "0.31 s"), (12.34, "12.3 s"), (245.2, "4 min 05 s")]
)
def test_duration_has_three_digits_or_minutes(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_progress_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        assert isinstance(progress, NullProgress)
        progress.stage("read", 2)
        progress.advance(detail="x")
        progress.done()
    assert capsys.readouterr() == ("", "")


def test_progress_is_silent_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress(quiet=True) as progress:
        assert isinstance(progress, NullProgress)


def test_stages_are_counted_and_completed_in_turn() -> None:
    display = RichProgress(console=Console(file=io.StringIO(), force_terminal=True))
    progress = ConsoleProgress(display)
    progress.advance()  # before any stage: nothing to count
    progress.stage("read [tensors]", 4)
    progress.advance(3, detail="[a]")
    first = display.tasks[0]
    assert (first.completed, first.total, first.fields["detail"]) == (3, 4, r"\[a]")
    progress.stage("trace")
    assert (first.completed, first.total, first.finished) == (4, 4, True)
    progress.advance(2)
    progress.done()
    progress.done()
    assert [(t.completed, t.total) for t in display.tasks] == [(4, 4), (2, 2)]


def test_values_keep_their_brackets_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    print_pairs([("name", "[bold]x")], title="result")
    assert "[bold]x" in out.getvalue()
    assert "result" in out.getvalue().splitlines()[0]
