"""What the passes of one compilation calibrate on, and with which means."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcompile.calibration.journal import Journal
from qcompile.calibration.samples import CalibrationData
from qcompile.calibration.stream import DEFAULT_PLAN, NumericPlan
from qcompile.errors import DataError
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Calibration:
    """The calibration settings of a compilation.

    Attributes:
        data: What to run programs on, or what makes it of a program when a pass first needs it
            (it may take the model's tokenizer, or the model's own text); None if there is none.
        memory_limit: Bytes of this process past which activations go to files; None for no limit.
        journal: Where finished work is kept, so that it need not be done again; None keeps none.
        plan: What rounding depends on.
    """

    data: CalibrationData | Callable[[Program], CalibrationData] | None = None
    memory_limit: int | None = None
    journal: Journal | None = None
    plan: NumericPlan = DEFAULT_PLAN

    @property
    def work_directory(self) -> Path | None:
        """Where activations go that memory does not hold; None is the system's choice."""
        return None if self.journal is None else self.journal.directory

    def inputs(self, program: Program, purpose: str) -> CalibrationData:
        """The data for a program.

        Args:
            program: What will run on it.
            purpose: What needs it, for the message: ``"method 'gptq'"``.

        Raises:
            DataError: There is none.
        """
        if self.data is None:
            raise DataError(
                f"{purpose} needs calibration data, and there is none",
                remedy="pass calibration= (a text file, texts, tokens, 'self' or example inputs)",
            )
        return self.data if isinstance(self.data, CalibrationData) else self.data(program)


_UNITS = {"": 1, "k": 1000, "ki": 1 << 10, "m": 1000**2, "mi": 1 << 20, "g": 1000**3, "gi": 1 << 30}


def parse_bytes(text: str | int) -> int:
    """Reads an amount of memory.

    Args:
        text: Bytes, or a number and a unit: ``"2GiB"``, ``"500 MB"``, ``"1.5G"``.

    Raises:
        DataError: It is none.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?)?b?", str(text).strip().lower())
    if match is None:
        raise DataError(
            f"'{text}' is no amount of memory", remedy="write a number and a unit, such as 2GiB"
        )
    return int(float(match[1]) * _UNITS[match[2] or ""])
