"""Weights that are stacks of matrices, one for each routed expert: methods see one at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.formats.base import ScalarFormat
from qcompile.passes.quantize.methods import Method, Outcome, Task

_MATRIX = 2


def matrices(name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
    """The matrices of a weight, each with the name that messages call it by.

    Args:
        name: Of the weight.
        weight: ``[N, K]``, or ``[E, N, K]``.
    """
    if weight.ndim == _MATRIX:
        return [(name, weight)]
    return [(f"{name}[{i}]", matrix) for i, matrix in enumerate(weight)]


def join(name: str, outcomes: Sequence[Outcome], *, stacked: bool) -> Outcome:
    """What a method made of the matrices of one weight, as one outcome.

    Args:
        name: Of the weight.
        outcomes: One for each matrix, in order.
        stacked: Whether the weight is a stack, be it of one matrix.

    Raises:
        RecipeError: The matrices cannot be stored as one weight.
    """
    if not stacked:
        return outcomes[0]
    formats = {str(outcome.weight.format): outcome.weight.format for outcome in outcomes}
    (format, *others) = formats.values()
    if others or not isinstance(format, ScalarFormat):
        raise RecipeError(
            f"'{name}' is a stack of {len(outcomes)} matrices, and formats such as {format} store "
            "one at a time",
            remedy="give experts an integer or lookup format in 'overrides', or 'ignore' them",
        )
    return Outcome(format.stack([o.weight for o in outcomes]), _fold_notes(outcomes))


def quantize_stacked(method: Method, task: Task) -> Outcome:
    """Lets a method that needs no statistics choose the codes of a weight, matrix by matrix.

    Args:
        method: The method.
        task: Its weight may be a stack.

    Raises:
        RecipeError: The matrices cannot be stored as one weight.
    """
    stacked = task.weight.ndim > _MATRIX
    outcomes = [
        method.quantize(Task(name, matrix, task.format, task.scale_search, alone=not stacked))
        for name, matrix in matrices(task.name, task.weight)
    ]
    return join(task.name, outcomes, stacked=stacked)


def _fold_notes(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Each note once, with the experts that it is about."""
    about: dict[str, list[str]] = {}
    for expert, outcome in enumerate(outcomes):
        for note in outcome.notes:
            about.setdefault(note, []).append(str(expert))
    return tuple(
        f"expert{'s' * (len(experts) > 1)} {', '.join(experts)}: {note}"
        for note, experts in about.items()
    )
