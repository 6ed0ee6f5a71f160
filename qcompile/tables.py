"""Tables as commands print them: drawn on a terminal, aligned text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

_GAP = "  "


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title.

    Attributes:
        title: What it is about.
        header: Names of the columns; empty for pairs of a name and a value.
        rows: The cells.
        right: Positions of the columns that are aligned to the right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()


def print_tables(tables: Sequence[Table]) -> None:
    """Prints tables on stdout, drawn if that is a terminal."""
    if not sys.stdout.isatty():
        print(format_tables(tables))
        return
    console = Console()
    for table in tables:
        console.print(_draw(table))


def format_tables(tables: Sequence[Table]) -> str:
    """Tables as plain text: the title, a line of names, aligned rows; a blank line between two."""
    return "\n\n".join("\n".join(_lines(table)) for table in tables)


def _lines(table: Table) -> Iterator[str]:
    yield table.title
    lines = [*([table.header] if table.header else []), *table.rows]
    if not lines:
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        cells = (
            cell.rjust(width) if i in table.right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield f"{_GAP}{_GAP.join(cells)}".rstrip()


def _draw(table: Table) -> RichTable:
    drawn = RichTable(
        title=escape(table.title), title_justify="left", show_header=bool(table.header)
    )
    columns = len(table.header) or max((len(row) for row in table.rows), default=1)
    for i in range(columns):
        name = table.header[i] if table.header else ""
        drawn.add_column(name, justify="right" if i in table.right else "left")
    for row in table.rows:
        drawn.add_row(*map(escape, row))
    return drawn
