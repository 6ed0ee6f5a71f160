"""Errors that a user can act on.

Every failure that comes from outside (a model, a recipe, a file, a text, a machine) is raised as
a `QCompileError`: one sentence that names the culprit, and a remedy. Anything else that escapes
is a defect of qcompile itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QCompileError(Exception):
    """Base of all errors that qcompile raises on purpose.

    Args:
        message: One sentence that names the culprit (file, layer, recipe line, argument).
        remedy: What the user can do about it, one sentence; shown on its own line.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message if remedy is None else f"{message}\n  remedy: {remedy}")
        self.message = message
        self.remedy = remedy


class RecipeError(QCompileError):
    """A recipe, an option or an argument is wrong."""

    exit_code = 2


class ModelError(QCompileError):
    """The model or its checkpoint cannot be read or captured."""

    exit_code = 3


class TargetError(QCompileError):
    """The target cannot run what the recipe asks of a layer."""

    exit_code = 4


class ArtifactError(QCompileError):
    """An artifact is missing, damaged, or made for something else."""

    exit_code = 5


class DataError(QCompileError):
    """A calibration or evaluation text cannot be used."""

    exit_code = 6


class EquivalenceError(QCompileError):
    """A pass that promises to keep the function did not."""

    exit_code = 7


class MissingExtraError(QCompileError):
    """An optional dependency is needed and absent.

    Args:
        package: The distribution that is missing, such as ``"transformers"``.
        extra: The extra of qcompile that installs it, such as ``"hf"``.
        purpose: What it is needed for, completing "... is needed to <purpose>".
    """

    exit_code = 8

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"the package '{package}' is needed to {purpose}, and is not installed",
            remedy=f"pip install 'qcompile[{extra}]'",
        )


def suggest(word: str, known: Iterable[str]) -> str:
    """A remedy for a word that is not known: the closest one that is, and all the others."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    choice = f"known: {', '.join(names)}" if names else "there is none"
    return f"did you mean '{close[0]}'? ({choice})" if close else choice
