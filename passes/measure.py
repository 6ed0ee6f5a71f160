"""What passes ask of calibration data, with the means of their compilation."""

from __future__ import annotations

from collections.abc import Iterable

from qcompile.calibration.engine import collect
from qcompile.calibration.requests import Request, Statistics
from qcompile.ir.program import Program
from qcompile.passes.infra import Context


def measure(
    program: Program, requests: Iterable[Request], context: Context, purpose: str
) -> Statistics:
    """Statistics of a program as it stands, on the calibration data of a compilation.

    Args:
        program: It is not changed.
        requests: Values and statistics.
        context: Calibration data, memory limit and progress.
        purpose: What needs them, for messages: ``"DuQuant"``.

    Raises:
        DataError: There is no calibration data, or it does not fit the program.
        ModelError: A value is not finite; names it.
    """
    calibration = context.calibration
    return collect(
        program,
        calibration.inputs(program, purpose),
        requests,
        memory_limit=calibration.memory_limit,
        work_directory=calibration.work_directory,
        plan=calibration.plan,
        progress=context.progress,
    )
