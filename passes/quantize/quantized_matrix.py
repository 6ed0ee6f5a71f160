"""One matrix quantized for its inputs, and how that is kept in the journal."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch

from qcompile.calibration.journal import Journal
from qcompile.formats import relative_error
from qcompile.passes.quantize.journal_entry import pack_outcome, unpack_outcome
from qcompile.passes.quantize.layer_inputs import Seen
from qcompile.passes.quantize.methods import Method, Outcome, Task


@dataclass(frozen=True)
class Errors:
    """Squares, summed over a matrix: those of several add up.

    Attributes:
        weight_error: Of weight - decoded.
        weight: Of the weight.
        result_error: Of the difference of outputs, over all rows that were seen.
        result: Of the outputs.
    """

    weight_error: float = 0.0
    weight: float = 0.0
    result_error: float = 0.0
    result: float = 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.weight_error + other.weight_error,
            self.weight + other.weight,
            self.result_error + other.result_error,
            self.result + other.result,
        )

    @property
    def relative_error(self) -> float:
        """||weight - decoded|| / ||weight||; 0 for zeros."""
        return math.sqrt(self.weight_error / self.weight) if self.weight else 0.0

    @property
    def output_error(self) -> float:
        """Mean squared error of the output over its mean square; 0 for zeros."""
        return self.result_error / self.result if self.result > 0 else 0.0


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A quantized matrix.

    Attributes:
        outcome: What the method made of it.
        errors: How far it is from the original.
    """

    outcome: Outcome
    errors: Errors


def quantize_matrix(method: Method, task: Task, seen: Seen) -> QuantizedMatrix:
    """Lets a method choose codes, and measures what they do.

    Args:
        method: The method.
        task: The matrix; its inputs are set here.
        seen: What was seen of its inputs.
    """
    outcome = method.quantize(replace(task, inputs=seen.inputs))
    weight, quantized = task.weight, outcome.weight
    decoded = quantized.format.decode(quantized)
    energy = float(weight.square().sum(dtype=torch.float64))
    errors = Errors(
        relative_error(weight, quantized) ** 2 * energy,
        energy,
        seen.inputs.energy(weight - decoded) * seen.rows,
        seen.inputs.energy(weight) * seen.rows,
    )
    return QuantizedMatrix(replace(outcome, notes=(*seen.notes, *outcome.notes)), errors)


def remember(journal: Journal | None, key: str, made: QuantizedMatrix) -> None:
    """Keeps a quantized matrix; see `recall`."""
    if journal is not None:
        journal.put(key, pack_outcome(made.outcome, asdict(made.errors)))


def recall(journal: Journal | None, key: str, task: Task) -> QuantizedMatrix | None:
    """A quantized matrix from the journal, or None if it is not there.

    Args:
        journal: Where to look.
        key: What it was remembered by.
        task: What was to be done.
    """
    entry = None if journal is None else journal.get(key)
    if entry is None:
        return None
    outcome, errors = unpack_outcome(task.format, tuple(task.weight.shape), entry)
    return QuantizedMatrix(outcome, Errors(**errors))
