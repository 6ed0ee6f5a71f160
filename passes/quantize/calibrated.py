"""Quantizing weights one after the other while calibration data flows past them.

By default each layer is calibrated on what the layers before it, already quantized, make of the
data: its codes then make up for their errors too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.analysis.stages import stages
from qcompile.calibration.journal import Journal
from qcompile.calibration.parallel import ordered_map
from qcompile.calibration.requests import Request, linear_inputs
from qcompile.calibration.settings import Calibration
from qcompile.calibration.statistics import Hessian
from qcompile.calibration.stream import Stream, digest_tensor
from qcompile.formats import Format, QuantizedWeight, ScaleSearch, relative_error
from qcompile.ir.program import Program
from qcompile.passes.quantize.methods import Method, Outcome, Task
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.progress import Progress

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
) -> Iterator[Finished]:
    """Quantizes weights of linears with methods that look at their inputs.

    The program gets a note, and its graph is not edited. A weight that several linears share is
    calibrated on the inputs of the first of them. What the journal knows is not done again.

    Args:
        program: The float program.
        jobs: Weights that linears use, and what to do.
        calibration: Data, journal and memory limit.
        method: What messages call the method.
        sequential: What the inputs have gone through.
        progress: Told of each micro-batch and each weight.

    Yields:
        Finished weights, in the order of the graph.

    Raises:
        DataError: There is no calibration data, or it does not fit.
        ModelError: A weight or its inputs cannot be worked with.
    """
    data = calibration.inputs(program, f"method '{method}'")
    program.notes += (f"weights are calibrated on {data.description}",)
    steps = _steps(program, jobs, sequential)
    targets = [value for step in steps for value in step.values]
    with Stream(
        program,
        data,
        targets,
        memory_limit=calibration.memory_limit,
        work_directory=calibration.work_directory,
        plan=calibration.plan,
    ) as stream:
        progress.stage("calibrate and quantize", len(steps) * stream.batches + len(jobs))
        for step in steps:
            work = _Work(program, stream, step, calibration.journal, sequential, progress)
            for finished in work.run():
                if sequential != "none":
                    weight = finished.outcome.weight
                    stream.override(finished.job.name, partial(weight.format.decode, weight))
                yield finished
            work.go_on()


@dataclass(frozen=True)
class _Step:
    """Weights that are quantized before data flows on.

    Attributes:
        jobs: For each input, the weights that it meets.
        boundary: Where data flows to afterwards, if not as far as the inputs anyway.
    """

    jobs: Mapping[fx.Node, Sequence[Job]]
    boundary: tuple[fx.Node, ...] = ()

    @property
    def values(self) -> list[fx.Node]:
        """The inputs."""
        return list(self.jobs)


def _steps(program: Program, jobs: Sequence[Job], sequential: Sequential) -> list[_Step]:
    inputs = linear_inputs(program)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    by_value: dict[fx.Node, list[Job]] = {}
    for job in jobs:
        by_value.setdefault(min(inputs[job.name], key=order.__getitem__), []).append(job)
    values = sorted(by_value, key=order.__getitem__)
    if sequential == "layer":
        return [_Step({value: by_value[value]}) for value in values]
    parts = stages(program)
    place = {node: stage.index for stage in reversed(parts) for node in stage.nodes}
    found: dict[int, dict[fx.Node, list[Job]]] = {}
    for value in values:
        # Where it is read: the input of the first block is made by none.
        index = min(place[user] for user in value.users if user in place)
        found.setdefault(index, {})[value] = by_value[value]
    steps = []
    for index, group in sorted(found.items()):
        end = parts[index].boundary if sequential == "block" else None
        steps.append(_Step(group, () if end is None else (end,)))
    return steps


class _Work:
    """One step: from the journal what it has, the rest from statistics."""

    def __init__(
        self,
        program: Program,
        stream: Stream,
        step: _Step,
        journal: Journal | None,
        sequential: Sequential,
        progress: Progress,
    ) -> None:
        self._program = program
        self._stream = stream
        self._step = step
        self._journal = journal
        self._stay = sequential == "block"
        self._reuse = sequential == "none"
        self._progress = progress
        self._observed = False

    def run(self) -> Iterator[Finished]:
        """The finished weights of the step, in the order of its jobs."""
        weights = {
            job: self._program.weights.materialize(job.name, torch.float32)
            for jobs in self._step.jobs.values()
            for job in jobs
        }
        key = self._stream.key(self._step.values)
        keys = {
            job: _key(key, value.name, digest_tensor(weights[job]), repr(job))
            for value, jobs in self._step.jobs.items()
            for job in jobs
        }
        known = {job: self._recall(job, keys[job], weights[job]) for job in keys}
        inputs = self._inputs(key) if None in known.values() else {}
        missing = [job for job, finished in known.items() if finished is None]
        value_of = {job: value for value, jobs in self._step.jobs.items() for job in jobs}

        def quantize(job: Job) -> Finished:
            finished = _quantize(job, weights[job], inputs[value_of[job]])
            self._remember(keys[job], finished)
            return finished

        made = dict(zip(missing, list(ordered_map(quantize, missing)), strict=True))
        for job, finished in known.items():
            self._progress.advance(1, job.name)
            yield finished or made[job]

    def go_on(self) -> None:
        """Lets data flow past the step."""
        if self._stay or not self._observed:
            self._stream.skip(self._step.values, instead=self._step.boundary)

    def _inputs(self, key: str) -> dict[fx.Node, Inputs]:
        """What is seen of each input; float inputs may have been seen in an earlier run."""
        keys = {value: _key(key, value.name, "hessian") for value in self._step.values}
        if self._reuse and self._journal is not None:
            tensors = {value: self._journal.get(keys[value]) for value in self._step.values}
            if None not in tensors.values():
                self._advance(self._stream.batches)
                return {v: Inputs(Hessian.of(t)) for v, t in tensors.items() if t is not None}
        requests = [Request(value, Hessian) for value in self._step.values]
        found = self._stream.observe(requests, stay=self._stay, on_batch=self._advance)
        self._observed = True
        hessians = {value: found.of(value, Hessian) for value in self._step.values}
        if self._reuse and self._journal is not None:
            for value, hessian in hessians.items():
                self._journal.put(keys[value], hessian.tensors())
        return {value: Inputs(hessian) for value, hessian in hessians.items()}

    def _advance(self, batches: int = 1) -> None:
        self._progress.advance(batches, next(iter(self._step.jobs.values()))[0].name)

    def _recall(self, job: Job, key: str, weight: Tensor) -> Finished | None:
        entry = None if self._journal is None else self._journal.get(key)
        return None if entry is None else unpack(job, tuple(weight.shape), entry)

    def _remember(self, key: str, finished: Finished) -> None:
        if self._journal is not None:
            self._journal.put(key, pack(finished))


def _quantize(job: Job, weight: Tensor, inputs: Inputs) -> Finished:
    outcome = job.method.quantize(Task(job.name, weight, job.format, job.scale_search, inputs))
    decoded = job.format.decode(outcome.weight)
    error = relative_error(weight, outcome.weight)
    return Finished(job, outcome, error, inputs.relative_error(weight, decoded))


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


_TENSOR = "tensor."


def pack(finished: Finished) -> dict[str, Tensor]:
    """A finished weight as a journal's entry; see `unpack`."""
    outcome = finished.outcome
    facts = json.dumps(
        {
            "notes": outcome.notes,
            "relative_error": finished.relative_error,
            "output_error": finished.output_error,
        }
    )
    entry = {_TENSOR + name: tensor for name, tensor in outcome.weight.tensors.items()}
    return entry | {"facts": torch.frombuffer(bytearray(facts.encode()), dtype=torch.uint8)}


def unpack(job: Job, shape: tuple[int, ...], entry: Mapping[str, Tensor]) -> Finished:
    """The finished weight of a journal's entry.

    Args:
        job: What was to be done.
        shape: Of the weight.
        entry: What `pack` made of it.
    """
    facts = json.loads(bytes(entry["facts"].tolist()))
    tensors = {k.removeprefix(_TENSOR): t for k, t in entry.items() if k.startswith(_TENSOR)}
    weight = QuantizedWeight(job.format, shape, tensors)
    outcome = Outcome(weight, tuple(facts["notes"]))
    return Finished(job, outcome, facts["relative_error"], facts["output_error"])
