"""The guide to weight formats is true."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.guides import assert_guide_is_true

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def test_guide_runs_and_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert_guide_is_true(GUIDE, capsys)
