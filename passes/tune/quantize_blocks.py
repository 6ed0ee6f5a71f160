"""Block by block, what is learned of weights goes down the difference from the float model.

The float model runs on the calibration data beside the model as it is quantized so far: a block
learns to make of the inputs that it will really get what the float block makes of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from qcompile.analysis.families import PortRole
from qcompile.analysis.sites import Site, find_sites
from qcompile.analysis.stages import Stage, stages
from qcompile.calibration.journal import Journal
from qcompile.calibration.requests import linear_inputs
from qcompile.calibration.settings import Calibration
from qcompile.calibration.stream import Stream
from qcompile.errors import ModelError
from qcompile.ir.program import Program
from qcompile.passes.quantize.calibrated import Finished, Job, Sequential
from qcompile.passes.quantize.methods.base import Task
from qcompile.passes.quantize.methods.block import BlockMethod
from qcompile.passes.transform.absorb import absorb
from qcompile.passes.tune.block import Block, LearnedWeights
from qcompile.passes.tune.descent import descend
from qcompile.passes.tune.learned import Learned, conclude, recall
from qcompile.passes.tune.narrow_products import has_narrow_products
from qcompile.passes.tune.site_scales import ScaledWeights, SiteScales, takes_scales
from qcompile.progress import Progress


def block_weights(program: Program) -> set[str]:
    """Names of the weights of linears that belong to a block, and so can be learned."""
    linears = linear_inputs(program)
    return {name for stage in _blocks(program) for name in stage.weights if name in linears}


def quantize_blocks(
    program: Program,
    jobs: Sequence[Job],
    method: BlockMethod,
    calibration: Calibration,
    *,
    name: str,
    sequential: Sequential,
    seed: int,
    progress: Progress,
) -> Iterator[Finished]:
    """Learns the codes of the weights of blocks.

    The program gets a note. Where the method learns scales of sites, the weights around these take
    them when the last block is finished; the graph is not edited. What the journal knows is not
    done again.

    Args:
        program: The float program.
        jobs: Weights of `block_weights(program)`, and what to do.
        method: What is learned, and how.
        calibration: Data, journal and memory limit.
        name: What messages call the method.
        sequential: ``"none"`` lets every block see the inputs of the float model; otherwise they
            have gone through the quantized weights of the blocks before.
        seed: Orders the data.
        progress: Told of each step.

    Yields:
        Finished weights, block by block. Their `output_error` is that of their block.

    Raises:
        DataError: There is no calibration data, or it does not fit.
        ModelError: What a block computes is not finite.
        RecipeError: A format is none that the method can learn codes of.
    """
    data = calibration.inputs(program, f"method '{name}'")
    program.notes += (f"weights are calibrated on {data.description}",)
    work = _work(program, jobs, method)
    outputs = [each.output for each in work]
    # One window at a time: windows are what minibatches are made of.
    plan = replace(calibration.plan, batch_tokens=1)

    def stream() -> Stream:
        return Stream(
            program,
            data,
            outputs,
            memory_limit=calibration.memory_limit,
            work_directory=calibration.work_directory,
            plan=plan,
        )

    scales: list[SiteScales] = []
    with stream() as targets, stream() as inputs:
        progress.stage("learn blocks", len(work) * method.descent.steps)
        journal = calibration.journal
        learner = _Learner(program, method, seed, journal, targets, inputs, progress)
        for each in work:
            learned = learner.learn(each)
            if sequential != "none":
                for weight, value in learned.values.items():
                    inputs.override(weight, value)
            inputs.skip([each.output])
            scales += learned.scales
            yield from learned.finished
    for found in scales:
        absorb(program, found.site, found.transforms())


@dataclass(frozen=True, eq=False)
class _Work:
    """A block and what is to be learned of it.

    Attributes:
        jobs: Its weights that become codes.
        output: Its value.
        sites: Those of its sites whose scales are learned.
    """

    jobs: Sequence[Job]
    output: fx.Node
    sites: Sequence[Site]

    @property
    def weights(self) -> list[str]:
        """All weights that change."""
        ports = [port for site in self.sites for port in site.ports]
        others = [port.weight for port in ports if port.role is not PortRole.CACHE]
        return list(dict.fromkeys([*(job.name for job in self.jobs), *others]))


def _work(program: Program, jobs: Sequence[Job], method: BlockMethod) -> list[_Work]:
    """The blocks that jobs belong to, in order; a shared weight belongs to its first one."""
    blocks = _blocks(program)
    readers = Counter(name for stage in stages(program) for name in stage.weights)
    sites = find_sites(program) if method.descent.scale_rate else []
    waiting = {job.name: job for job in jobs}
    found = []
    for stage in blocks:
        own = [waiting.pop(name) for name in stage.weights if name in waiting]
        alone = {name for name in stage.weights if readers[name] == 1}
        inner = [site for site in sites if takes_scales(site) and _owns(alone, site)]
        if own:
            found.append(_Work(own, _output(stage), inner))
    return found


def _owns(names: set[str], site: Site) -> bool:
    return all(port.weight in names for port in site.ports if port.role is not PortRole.CACHE)


def _blocks(program: Program) -> list[Stage]:
    """The decoder blocks; of a program without any, all that it computes of its content."""
    parts = stages(program)
    return [part for part in parts if part.block is not None] or parts[-1:]


def _output(stage: Stage) -> fx.Node:
    """What a block hands on, or, of the last one, what it returns first."""
    if stage.boundary is not None:
        return stage.boundary
    return next(node for node in stage.outputs if node.meta["val"].is_floating_point())


@dataclass(frozen=True, eq=False)
class _Learner:
    """Learns one block after the other.

    Attributes:
        program: The float program.
        method: What is learned, and how.
        seed: Orders the data.
        journal: What is known already.
        targets: The float model on its way over the data.
        inputs: The model as it is quantized so far on its way.
        progress: Told of each step.
    """

    program: Program
    method: BlockMethod
    seed: int
    journal: Journal | None
    targets: Stream
    inputs: Stream
    progress: Progress

    def learn(self, work: _Work) -> Learned:
        """What is learned of a block: from the journal, or by descent."""
        scales = [SiteScales(site, self.method.descent.scale_rate) for site in work.sites]
        weights = {
            name: self.program.weights.materialize(name, torch.float32).clone()
            for name in work.weights
        }
        scaled = ScaledWeights(scales, {name: tuple(w.shape) for name, w in weights.items()})
        key = self._key(work)
        entry = None if self.journal is None else self.journal.get(key)
        if entry is not None:
            self.targets.skip([work.output])
            self.progress.advance(self.method.descent.steps, work.jobs[0].name)
            return recall(work.jobs, scales, scaled, weights, entry)
        tasks = [Task(j.name, weights[j.name], j.format, j.scale_search) for j in work.jobs]
        learners = {task.name: self.method.learner(task) for task in tasks}
        present = LearnedWeights(weights, learners, scaled)
        output_error = self._descend(work, present)
        learned = conclude(work.jobs, scales, scaled, present, output_error)
        if self.journal is not None:
            self.journal.put(key, learned.entry())
        return learned

    def _descend(self, work: _Work, present: LearnedWeights) -> float:
        """Learns; the relative error of the block's output that is left."""
        descent, first = self.method.descent, work.jobs[0].name
        self.targets.reach([work.output])
        piece = self.inputs.piece([work.output])
        bits = descent.activation_bits
        block = Block(piece, self.inputs, self.targets, work.output, present, bits)
        generator = torch.Generator().manual_seed(self.seed)
        found = descend(block, descent, generator, on_step=lambda: self.progress.advance(1, first))
        self.progress.advance(descent.steps - found.steps, first)
        energy = block.energy()
        if not math.isfinite(energy + found.before):
            raise ModelError(
                f"the output of the block of '{first}' is not finite on the calibration data",
                remedy="its weights or its arithmetic overflow: check the model in float32",
            )
        return found.after / energy if energy else 0.0

    def _key(self, work: _Work) -> str:
        """A hash of all that decides about a block."""
        streams = (stream.key([work.output]) for stream in (self.targets, self.inputs))
        jobs = map(repr, work.jobs)
        parts = ("block", *streams, str(self.seed), str(has_narrow_products()), *jobs)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()
