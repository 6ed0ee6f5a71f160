from __future__ import annotations

from pathlib import Path

import pytest
from tests.guides import assert_guide_is_true

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "calibration.md"


def test_guide_to_calibration_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    assert_guide_is_true(GUIDE, capsys)
