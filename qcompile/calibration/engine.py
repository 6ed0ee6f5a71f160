"""Collecting statistics of a program as it stands: the way in for passes that measure first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import fx

from qcompile.analysis.stages import stages
from qcompile.calibration.requests import Request, Statistics, linear_inputs
from qcompile.calibration.samples import CalibrationData
from qcompile.calibration.stream import DEFAULT_PLAN, Hook, NumericPlan, Stream
from qcompile.ir.program import Program
from qcompile.progress import NullProgress, Progress

__all__ = ["NumericPlan", "Request", "Statistics", "Stream", "collect", "linear_inputs"]


def collect(
    program: Program,
    data: CalibrationData,
    requests: Iterable[Request],
    *,
    hooks: Mapping[fx.Node, Hook] | None = None,
    memory_limit: int | None = None,
    work_directory: Path | None = None,
    plan: NumericPlan = DEFAULT_PLAN,
    progress: Progress | None = None,
) -> Statistics:
    """Collects statistics of values of a program as it stands, stage by stage.

    Example::

        inputs = linear_inputs(program)
        wanted = [Request(v, ChannelRange) for values in inputs.values() for v in values]
        found = collect(program, data, wanted)
        found.of_weight("model.layers.0.mlp.up_proj.weight", ChannelRange).absmax  # [K]
        found.of(some_node, ChannelRange)

    Args:
        program: Any program that can be interpreted; it is not changed.
        data: What to run it on.
        requests: Values and statistics; the same one twice is collected once.
        hooks: What becomes of values as they are computed; statistics and later nodes see the
            result.
        memory_limit: Bytes of this process past which activations go to files.
        work_directory: Where those files are made.
        plan: What rounding depends on.
        progress: Told of each micro-batch of each stage.

    Returns:
        What was asked for.

    Raises:
        DataError: The data does not fit the program.
        ModelError: A value is not finite; names it and the weights that it meets.
    """
    wanted = list(dict.fromkeys(requests))
    progress = progress or NullProgress()
    result = Statistics(linear_inputs(program))
    with Stream(
        program,
        data,
        [request.value for request in wanted],
        hooks=hooks,
        memory_limit=memory_limit,
        work_directory=work_directory,
        plan=plan,
    ) as stream:
        parts = _by_stage(program, wanted)
        progress.stage("collect statistics", len(parts) * stream.batches)
        for part in parts:
            found = stream.observe(part, on_batch=progress.advance)
            result.collected |= found.collected
    return result


def _by_stage(program: Program, requests: Sequence[Request]) -> list[list[Request]]:
    """Requests by the stage that computes their value, in order; inputs come first."""
    place = {node: stage.index for stage in reversed(stages(program)) for node in stage.nodes}
    parts: dict[int, list[Request]] = {}
    for request in requests:
        parts.setdefault(place.get(request.value, -1), []).append(request)
    return [parts[index] for index in sorted(parts)]
