"""Guides whose Python blocks run, and whose text blocks are what these print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def assert_guide_is_true(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the Python blocks of a guide in order, and compares what they print.

    Args:
        path: A Markdown file with ``python`` and ``text`` blocks; each text block is what the
            Python block before it prints.
        capsys: The fixture of the calling test.
    """
    blocks = re.findall(r"^```(python|text)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    assert any(kind == "text" for kind, _ in blocks)
    namespace: dict[str, object] = {"__name__": "guide"}
    printed = ""
    for kind, block in blocks:
        if kind == "python":
            assert printed == "", f"the guide does not show what this prints:\n{printed}"
            exec(compile(block, str(path), "exec", dont_inherit=True), namespace)
            printed = capsys.readouterr().out
        else:
            assert block == printed
            printed = ""
    assert printed == ""
