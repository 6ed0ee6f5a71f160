"""What was learned of a block, and how the journal keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from qcompile.formats import relative_error
from qcompile.passes.quantize.calibrated import Finished, Job
from qcompile.passes.quantize.journal_entry import pack_outcome, unpack_outcome
from qcompile.passes.quantize.methods.base import Outcome
from qcompile.passes.tune.block import LearnedWeights
from qcompile.passes.tune.site_scales import ScaledWeights, SiteScales


@dataclass(frozen=True, eq=False)
class Learned:
    """What was learned of a block.

    Attributes:
        finished: Its weights that became codes.
        scales: Of its sites.
        others: Weights that only the scales have changed, float32, by name.
    """

    finished: Sequence[Finished]
    scales: Sequence[SiteScales]
    others: Mapping[str, Tensor]

    @property
    def values(self) -> dict[str, Callable[[], Tensor]]:
        """What data flows through from now on, by name of the weight."""
        found: dict[str, Callable[[], Tensor]] = {
            name: partial(_itself, tensor) for name, tensor in self.others.items()
        }
        for each in self.finished:
            weight = each.outcome.weight
            found[each.job.name] = partial(weight.format.decode, weight)
        return found

    def entry(self) -> dict[str, Tensor]:
        """Its entry in the journal; see `recall`."""
        entry = {f"scales.{i}": s.learnable.value.detach() for i, s in enumerate(self.scales)}
        for i, each in enumerate(self.finished):
            facts = {"relative_error": each.relative_error, "output_error": each.output_error}
            packed = pack_outcome(each.outcome, facts)
            entry |= {f"{i}.{name}": tensor for name, tensor in packed.items()}
        return entry


def conclude(
    jobs: Sequence[Job],
    scales: Sequence[SiteScales],
    scaled: ScaledWeights,
    present: LearnedWeights,
    output_error: float,
) -> Learned:
    """What the numbers that a descent has found stand for.

    Args:
        jobs: What was to be done.
        scales: Of the sites.
        scaled: What these make of weights.
        present: The weights as they are learned.
        output_error: Of the block, relative.
    """
    finished = []
    for job in jobs:
        weight, quantized = present.finish(job.name)
        assert quantized is not None
        error = relative_error(weight, quantized)
        finished.append(Finished(job, Outcome(quantized), error, output_error))
    return Learned(finished, scales, _others(jobs, scaled, present.weights))


def recall(
    jobs: Sequence[Job],
    scales: Sequence[SiteScales],
    scaled: ScaledWeights,
    weights: Mapping[str, Tensor],
    entry: Mapping[str, Tensor],
) -> Learned:
    """What an entry of the journal says; `scales` get their numbers from it."""
    for i, each in enumerate(scales):
        each.learnable.assign(entry[f"scales.{i}"])
    finished = []
    for i, job in enumerate(jobs):
        own = {k.removeprefix(f"{i}."): t for k, t in entry.items() if k.startswith(f"{i}.")}
        outcome, facts = unpack_outcome(job.format, tuple(weights[job.name].shape), own)
        finished.append(Finished(job, outcome, **facts))
    return Learned(finished, scales, _others(jobs, scaled, weights))


def _others(
    jobs: Sequence[Job], scaled: ScaledWeights, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    coded = {job.name for job in jobs}
    return {name: scaled.final(name, weights[name]) for name in sorted(scaled.names - coded)}


def _itself(tensor: Tensor) -> Tensor:
    return tensor
