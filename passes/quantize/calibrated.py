"""Quantizing weights one after the other while calibration data flows past them.

By default each layer is calibrated on what the layers before it, already quantized, make of the
data: its codes then make up for their errors too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.analysis.stages import stages
from qcompile.calibration.journal import Journal
from qcompile.calibration.parallel import ordered_map
from qcompile.calibration.part import digest_tensor
from qcompile.calibration.requests import Request, Statistics, layer_requests
from qcompile.calibration.settings import Calibration
from qcompile.calibration.statistics import Hessian, Routed, Rows, Statistic
from qcompile.calibration.stream import Stream
from qcompile.formats import Format, ScaleSearch
from qcompile.ir.program import Program
from qcompile.passes.quantize.layer_inputs import Seen, seen_inputs
from qcompile.passes.quantize.methods import Method, Outcome, Task
from qcompile.passes.quantize.quantized_matrix import (
    Errors,
    QuantizedMatrix,
    quantize_matrix,
    recall,
    remember,
)
from qcompile.passes.quantize.split_experts import split_experts
from qcompile.passes.quantize.stacked import join, matrices
from qcompile.progress import Progress

_SAMPLE = partial(Rows, every=16)
"""The rows that methods look at which ask for some: 128 of a full micro-batch."""

Sequential = Literal["layer", "block", "none"]
"""Whose quantized weights the inputs of a layer have gone through: those of all layers before it,
of all decoder blocks before its own, or of none (float inputs)."""


@dataclass(frozen=True)
class Job:
    """A weight that waits to be quantized.

    Attributes:
        name: Its entry in the weight store.
        format: What will be stored.
        scale_search: How scales are chosen.
        method: How codes are chosen.
    """

    name: str
    format: Format
    scale_search: ScaleSearch
    method: Method


@dataclass(frozen=True, eq=False)
class Finished:
    """A quantized weight.

    Attributes:
        job: What was to be done.
        outcome: What came of it.
        relative_error: ||w - decoded|| / ||w||, Frobenius.
        output_error: Mean squared error of the layer's output over its mean square, on the
            calibration data.
    """

    job: Job
    outcome: Outcome
    relative_error: float
    output_error: float


def quantize_calibrated(
    program: Program,
    jobs: Sequence[Job],
    calibration: Calibration,
    *,
    method: str,
    sequential: Sequential,
    progress: Progress,
    rounds: int = 1,
) -> Iterator[Finished]:
    """Quantizes weights of linears and routed experts with methods that look at their inputs.

    The program gets a note, and its graph is not edited. A weight that stands in several places is
    quantized when the last of them is reached, on the inputs of all. What the journal knows is not
    done again.

    Args:
        program: The float program.
        jobs: Weights that linears and experts use, and what to do.
        calibration: Data, journal and memory limit.
        method: What messages call the method.
        sequential: What the inputs have gone through.
        progress: Told of each micro-batch and each weight.
        rounds: How often the data goes through the program. From the second time on, weights that
            are not quantized anew yet are those of the round before, not float ones.

    Yields:
        Finished weights of the last round, in the order of the graph.

    Raises:
        DataError: There is no calibration data, or it does not fit.
        ModelError: A weight or its inputs cannot be worked with.
    """
    data = calibration.inputs(program, f"method '{method}'")
    program.notes += (f"weights are calibrated on {data.description}",)
    walked = split_experts(program)
    steps = _steps(walked, jobs, sequential)
    decoded: dict[str, Callable[[], Tensor]] = {}
    for left in reversed(range(rounds)):
        with Stream(
            walked,
            data,
            [value for step in steps for value in step.values],
            memory_limit=calibration.memory_limit,
            work_directory=calibration.work_directory,
            plan=calibration.plan,
        ) as stream:
            for name, value in decoded.items():
                stream.override(name, value)
            progress.stage("calibrate and quantize", len(steps) * stream.batches + len(jobs))
            for number, step in enumerate(steps):
                later = {value for other in steps[number + 1 :] for value in other.values}
                work = _Work(walked, stream, step, later, calibration.journal, sequential, progress)
                for finished in work.run():
                    weight, name = finished.outcome.weight, finished.job.name
                    decoded[name] = partial(weight.format.decode, weight)
                    if sequential != "none":
                        stream.override(name, decoded[name])
                    if not left:
                        yield finished
                work.go_on()


@dataclass(frozen=True)
class _Step:
    """Weights that are quantized before data flows on.

    Attributes:
        jobs: Each weight, and what is to be known of its inputs: one request for each place.
        boundary: Where data flows to afterwards, if not as far as the inputs anyway.
    """

    jobs: Mapping[Job, tuple[Request, ...]]
    boundary: tuple[fx.Node, ...] = ()

    @property
    def requests(self) -> list[Request]:
        """Each once."""
        return list(dict.fromkeys(r for requests in self.jobs.values() for r in requests))

    @property
    def samples(self) -> list[Request]:
        """Rows of inputs, for the methods that look at some; those of experts are not kept."""
        looked_at = (
            Request(request.value, _SAMPLE)
            for job, requests in self.jobs.items()
            for request in requests
            if Rows in job.method.statistics and request.routing is None
        )
        return list(dict.fromkeys(looked_at))

    @property
    def values(self) -> list[fx.Node]:
        """The inputs, and what says which experts see them."""
        return list(dict.fromkeys(node for request in self.requests for node in request.nodes))


def _steps(program: Program, jobs: Sequence[Job], sequential: Sequential) -> list[_Step]:
    requests = layer_requests(program, Hessian)
    order = {node: i for i, node in enumerate(program.graph.nodes)}

    def last_value(job: Job) -> int:
        return max(order[node] for request in requests[job.name] for node in request.nodes)

    ordered = sorted(jobs, key=last_value)
    if sequential == "layer":
        return [_Step(group) for group in _grouped(ordered, last_value, requests).values()]
    parts = stages(program)
    place = {node: stage.index for stage in reversed(parts) for node in stage.nodes}

    def last_stage(job: Job) -> int:
        # Where inputs are read: that of the first block is made by none.
        return max(
            min(place[user] for user in request.value.users if user in place)
            for request in requests[job.name]
        )

    steps = []
    for index, group in sorted(_grouped(ordered, last_stage, requests).items()):
        end = parts[index].boundary if sequential == "block" else None
        steps.append(_Step(group, () if end is None else (end,)))
    return steps


def _grouped(
    jobs: Sequence[Job], place: Callable[[Job], int], requests: Mapping[str, tuple[Request, ...]]
) -> dict[int, dict[Job, tuple[Request, ...]]]:
    """Jobs by a place in the program, with their requests."""
    found: dict[int, dict[Job, tuple[Request, ...]]] = {}
    for job in jobs:
        found.setdefault(place(job), {})[job] = requests[job.name]
    return found


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A weight, or one expert's part of it, before it is quantized.

    Attributes:
        job: What is to be done with it.
        index: Which of the weight's matrices it is.
        task: The same for a method; without inputs.
        key: What names its outcome in the journal.
    """

    job: Job
    index: int
    task: Task
    key: str


class _Work:
    """One step: from the journal what it has, the rest from statistics."""

    def __init__(
        self,
        program: Program,
        stream: Stream,
        step: _Step,
        later: Collection[fx.Node],
        journal: Journal | None,
        sequential: Sequential,
        progress: Progress,
    ) -> None:
        self._program = program
        self._stream = stream
        self._step = step
        self._again = [value for value in step.values if value in later]
        self._journal = journal
        self._stay = sequential == "block"
        self._reuse = sequential == "none"
        self._progress = progress
        self._observed = False
        self._key = stream.key(step.values, again=self._again)

    def run(self) -> Iterator[Finished]:
        """The finished weights of the step, in the order of its jobs."""
        todo = {job: self._matrices(job) for job in self._step.jobs}
        known = {
            matrix: recall(self._journal, matrix.key, matrix.task)
            for parts in todo.values()
            for matrix in parts
        }
        missing = [matrix for matrix, outcome in known.items() if outcome is None]
        inputs = self._inputs() if missing else {}

        def quantize(matrix: _Matrix) -> QuantizedMatrix:
            seen = inputs[self._step.jobs[matrix.job]][matrix.index]
            made = quantize_matrix(matrix.job.method, matrix.task, seen)
            remember(self._journal, matrix.key, made)
            return made

        made = dict(zip(missing, list(ordered_map(quantize, missing)), strict=True))
        for job, parts in todo.items():
            self._progress.advance(1, job.name)
            yield _finish(job, [known[part] or made[part] for part in parts], self._is_stack(job))

    def go_on(self) -> None:
        """Lets data flow past the step."""
        if self._stay or not self._observed:
            step = self._step
            self._stream.skip(step.values, instead=step.boundary, again=self._again)

    def _matrices(self, job: Job) -> list[_Matrix]:
        weight = self._program.weights.materialize(job.name, torch.float32)
        alone = not self._is_stack(job)
        met = ",".join(node.name for r in self._step.jobs[job] for node in r.nodes)
        return [
            _Matrix(
                job,
                index,
                Task(name, matrix, job.format, job.scale_search, alone=alone),
                _key(self._key, met, str(index), digest_tensor(matrix), repr(job)),
            )
            for index, (name, matrix) in enumerate(matrices(job.name, weight))
        ]

    def _is_stack(self, job: Job) -> bool:
        return self._step.jobs[job][0].routing is not None

    def _inputs(self) -> dict[tuple[Request, ...], list[Seen]]:
        """What is seen of the inputs; float inputs may have been seen in an earlier run."""
        found = self._recalled() if self._reuse else None
        if found is None:
            found = self._stream.observe(
                self._wanted, again=self._again, stay=self._stay, on_batch=self._advance
            )
            self._observed = True
            if self._reuse and self._journal is not None:
                for request in self._wanted:
                    key = _statistic_key(self._key, request)
                    self._journal.put(key, _statistic(found, request))
        else:
            self._advance(self._stream.batches)
        return {
            requests: seen_inputs(found, requests)
            for requests in dict.fromkeys(self._step.jobs.values())
        }

    def _recalled(self) -> Statistics | None:
        """The statistics of the step, if the journal has them all."""
        found = Statistics()
        for request in self._wanted:
            key = _statistic_key(self._key, request)
            stored = None if self._journal is None else self._journal.get(key)
            if stored is None:
                return None
            kind = _kind(request)
            if request.routing is None:
                found.collected[request.value.name, kind, (-1,)] = kind.of(stored)
            else:
                found.routed[request.value.name, Hessian] = Routed.of(Hessian, stored)
        return found

    @property
    def _wanted(self) -> list[Request]:
        return [*self._step.requests, *self._step.samples]

    def _advance(self, batches: int = 1) -> None:
        self._progress.advance(batches, next(iter(self._step.jobs)).name)


def _finish(job: Job, parts: Sequence[QuantizedMatrix], stacked: bool) -> Finished:
    outcome = join(job.name, [part.outcome for part in parts], stacked=stacked)
    errors = sum((part.errors for part in parts), Errors())
    return Finished(job, outcome, errors.relative_error, errors.output_error)


def _statistic_key(key: str, request: Request) -> str:
    return _key(key, *(node.name for node in request.nodes), _kind(request).__name__.lower())


def _kind(request: Request) -> type[Statistic]:
    return Rows if request.statistic is _SAMPLE else Hessian


def _statistic(found: Statistics, request: Request) -> dict[str, Tensor]:
    """The tensors of what was requested."""
    if request.routing is None:
        return found.of(request.value, _kind(request)).tensors()
    return found.routed[request.value.name, Hessian].tensors()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
