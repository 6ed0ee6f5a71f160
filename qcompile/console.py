"""What the command line shows: progress and errors on stderr, results on stdout.

On a terminal results are tables; in a pipe they are lines of ``name<TAB>value``, and progress is
silent. The JSON form is one document.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from qcompile.progress import NullProgress, Progress


@contextlib.contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Shows progress on stderr while the block runs, if that is a terminal and nobody minds."""
    if quiet or not sys.stderr.isatty():
        yield NullProgress()
        return
    # Four frames a second: drawing must not take cores from the work that it reports on.
    display = RichProgress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _TimeColumn(),
        TextColumn("[dim]{task.fields[detail]}"),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
    with display:
        progress = ConsoleProgress(display)
        yield progress
        progress.done()


class ConsoleProgress:
    """One line per stage: a bar, what is done of it, the time taken and the time left.

    Args:
        display: The rich display that draws the lines; its owner starts and stops it.
    """

    def __init__(self, display: RichProgress) -> None:
        self._display = display
        self._task: TaskID | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        """Completes the line of the stage before and begins one."""
        self.done()
        self._task = self._display.add_task(escape(name), total=total, detail="")

    def advance(self, n: int = 1, detail: str = "") -> None:
        """Moves the bar of the current stage."""
        if self._task is not None:
            self._display.update(self._task, advance=n, detail=escape(detail))

    def done(self) -> None:
        """Completes the current line. A stage of unknown size had as many units as were done."""
        if self._task is None:
            return
        task = next(task for task in self._display.tasks if task.id == self._task)
        total = task.total if task.total is not None else max(task.completed, 1)
        self._display.update(self._task, total=total, completed=total, detail="")
        self._display.stop_task(self._task)
        self._task = None


class _TimeColumn(ProgressColumn):
    """The time left while a stage runs, where that can be told; the time taken afterwards."""

    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text(seconds_text(task.elapsed or 0.0))
        return Text(f"{seconds_text(math.ceil(task.time_remaining))} left", style="cyan")


def print_json(document: object) -> None:
    """Prints one JSON document; numbers that JSON lacks (NaN, infinity) become null."""
    print(json.dumps(_finite(document), indent=2, ensure_ascii=False))


def print_pairs(pairs: Sequence[tuple[str, str]], *, title: str | None = None) -> None:
    """Prints names with their values."""
    print_table(("", ""), pairs, title=title)


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
) -> None:
    """Prints a table on a terminal, tab-separated rows without header in a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    table = Table(title=title, title_justify="left", show_header=any(header))
    for name in header:
        table.add_column(name)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)


def print_error(message: str, remedy: str | None = None) -> None:
    """Prints what went wrong, in red, and what to do about it, on stderr."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] [red]{escape(message)}[/]")
    if remedy is not None:
        console.print(f"[bold]remedy:[/] {escape(remedy)}")


def print_note(note: str) -> None:
    """Prints what a user may want to know, on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold]note:[/] {escape(note)}")


def error_document(kind: str, message: str, remedy: str | None, exit_code: int) -> object:
    """An error as commands with ``--json`` print it."""
    fields = {"type": kind, "message": message, "remedy": remedy, "exit_code": exit_code}
    return {"error": fields}


def prepare_streams() -> None:
    """Lets text that the terminal's encoding lacks be printed with replacements."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def discard_stdout() -> None:
    """Points stdout nowhere, after its reader has gone: Python flushes it once more at exit."""
    with contextlib.suppress(OSError, ValueError):  # a stdout without a file descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def size_text(count: float) -> str:
    """A number of bytes for people: ``101.4 MB``, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration for people: ``0.31 s``, ``12.3 s``, ``4 min 05 s``; whole ones without dot."""
    if isinstance(seconds, int) and seconds < 100:
        return f"{seconds} s"
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)
