"""How much a program's loss rises with the error of each weight, measured by noise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.calibration.part import digest_tensor
from qcompile.calibration.settings import Calibration
from qcompile.ir.program import Program
from qcompile.passes.quantize.allocation.probe import Change, Probe
from qcompile.progress import Progress

NOISE = 0.1
"""||noise|| / ||weight|| of what is injected: about the error of 4 bits."""

_VERSION = "1"


@dataclass(frozen=True)
class Sensitivities:
    """What errors of weights do to a program's predictions.

    Attributes:
        slopes: For each weight, divergence (`Change.divergence`) per squared relative error.
        surprise_ratio: Of the increase of the negative log-likelihood to the divergence, over all
            weights together; None for programs that predict no tokens.
        description: What they were measured on.
    """

    slopes: dict[str, float]
    surprise_ratio: float | None
    description: str

    def surprise(self, divergence: float) -> float | None:
        """The increase of the negative log-likelihood, in nats, that goes with a divergence."""
        return None if self.surprise_ratio is None else self.surprise_ratio * divergence


def measure_sensitivities(
    program: Program,
    names: Sequence[str],
    calibration: Calibration,
    tokens: int,
    progress: Progress,
) -> tuple[Sensitivities, Probe]:
    """Adds normal noise to one weight at a time.

    Finished weights are found again in the journal. Results are the same for equal versions and
    instruction sets; torch's products of matrices may round differently with other numbers of
    threads, by less than the last digits that are reported.

    Args:
        program: The float program.
        names: Weights, entries of its store.
        calibration: Data and journal.
        tokens: Of the data, the first so many are used.
        progress: Told of each weight.

    Returns:
        The slopes, and the probe that measured them.

    Raises:
        DataError: There is no calibration data, or it does not fit.
    """
    data = calibration.inputs(program, "the choice of formats for a budget")
    inputs = data.batches(program, tokens)[0]
    progress.stage("measure sensitivities", len(names))
    probe = Probe(program, inputs)
    key = _digest(
        _VERSION,
        str(NOISE),
        program.text(),
        *map(digest_tensor, inputs),
        *(digest_tensor(program.weights.materialize(name)) for name in program.weights),
        *(f"{k}={v}" for k, v in sorted(calibration.plan.key().items())),
    )
    found = {}
    for name in names:
        found[name] = _measure(probe, program, name, calibration, _digest(key, name))
        progress.advance(1, name)
    slopes = {name: change.divergence / NOISE**2 for name, change in found.items()}
    count = next(iter(inputs)).shape[:2].numel()
    description = f"{count} tokens of {data.description}"
    return Sensitivities(slopes, _surprise_ratio(found.values()), description), probe


def _measure(
    probe: Probe, program: Program, name: str, calibration: Calibration, key: str
) -> Change:
    entry = None if calibration.journal is None else calibration.journal.get(key)
    if entry is None:
        weight = program.weights.materialize(name, torch.float32)
        change = probe.change({name: weight + noise(weight, name)})
        surprise = math.nan if change.surprise is None else change.surprise
        entry = {"change": torch.tensor([change.divergence, surprise], dtype=torch.float64)}
        if calibration.journal is not None:
            calibration.journal.put(key, entry)
    divergence, surprise = entry["change"].tolist()
    return Change(divergence, None if math.isnan(surprise) else surprise)


def noise(weight: Tensor, name: str) -> Tensor:
    """Normal numbers of a norm of `NOISE` times that of a weight, the same for the same name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    return drawn * (NOISE * float(weight.norm()) / max(float(drawn.norm()), 1e-30))


def _surprise_ratio(changes: Collection[Change]) -> float | None:
    total = sum(change.divergence for change in changes)
    known = [change.surprise for change in changes if change.surprise is not None]
    return sum(known) / total if known and total > 0 else None


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
