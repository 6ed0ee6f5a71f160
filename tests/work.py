"""How much work something is, in numbers that no other process changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType


def function_calls(run: Callable[[], object]) -> int:
    """How many Python functions are called while `run` runs, itself included."""
    counted = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        del frame, argument
        counted += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(before)
    return counted
