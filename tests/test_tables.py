"""Tables in a pipe and on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from qcompile.tables import Table, format_tables, print_tables

PAIRS = Table("model", (), (("name", "tiny"), ("parameters", "32")))
COUNTS = Table(
    "operators", ("operator", "raise"), (("add", "4"), ("qc.rope", "12")), frozenset({1})
)


def test_columns_are_aligned_without_trailing_space() -> None:
    assert format_tables([PAIRS, COUNTS]) == (
        "model\n"
        "  name        tiny\n"
        "  parameters  32\n"
        "\n"
        "operators\n"
        "  operator  raise\n"
        "  add           4\n"
        "  qc.rope      12"
    )


def test_table_without_rows_is_its_title() -> None:
    assert format_tables([Table("barriers: none", (), ())]) == "barriers: none"


def test_pipe_gets_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables([PAIRS])
    assert capsys.readouterr().out == format_tables([PAIRS]) + "\n"


def test_terminal_gets_drawn_tables_with_brackets_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", out)
    print_tables([Table("layers", ("layer",), (("layers.[0-1].up",),))])
    text = out.getvalue()
    assert "layers.[0-1].up" in text
    assert "─" in text
