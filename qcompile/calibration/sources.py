"""Where calibration data comes from: a file, texts, tokens, a dataset, or the model itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import Tensor

from qcompile.calibration.data import TokenArray, load_text, windows
from qcompile.calibration.generate import generate_windows
from qcompile.calibration.samples import CalibrationData, ExampleInputs, TokenWindows
from qcompile.errors import DataError
from qcompile.ir.program import Program
from qcompile.ir.types import Role

SELF: Final = "self"
"""The word for text that the model writes itself."""

_WAYS = "a text file, a list of texts, token arrays, a dataset, 'self', or example inputs"


@dataclass
class DataSource:
    """Makes calibration data when a pass first asks for it, and the same from then on.

    Attributes:
        given: What the user gave: a path of a UTF-8 file; texts; token ids, [n] or [windows,
            length] or a list of such; a `datasets.Dataset` with a column of texts or of
            ``input_ids``; ``"self"``; example inputs (tensors, tuples or mappings of them); or
            `CalibrationData`. None is the text that every Python carries, or `examples` for
            models that read no tokens.
        tokenize: From text to token ids; None where the model has no tokenizer.
        samples: Windows to use, at most.
        length: Tokens per window.
        seed: For text that the model writes.
        examples: What the model was traced with, if the user gave that.
    """

    given: Any = None
    tokenize: Callable[[str], Sequence[int]] | None = None
    samples: int = 128
    length: int = 512
    seed: int = 0
    examples: Any = None
    _made: CalibrationData | None = field(default=None, init=False, repr=False)

    def check(self) -> None:
        """Looks whether a file that was given can be used, before any work begins.

        Raises:
            DataError: It cannot.
        """
        if isinstance(self.given, (str, os.PathLike)) and self.given != SELF:
            load_text(self.given)

    def __call__(self, program: Program) -> CalibrationData:
        """The data for a program.

        Raises:
            DataError: What was given cannot be used for it.
        """
        if self._made is None:
            self._made = self._make(program)
        return self._made

    def _make(self, program: Program) -> CalibrationData:
        given = self.given
        if isinstance(given, CalibrationData):
            return given
        if not program.signature.has(Role.INPUT_IDS):
            return self._examples(program)
        if given is None:
            return self._of_text(load_text(), "the standard library's help text")
        if isinstance(given, str) and given == SELF:
            tokens = generate_windows(program, self.samples, self.length, seed=self.seed)
            return TokenWindows(tokens, f"text that the model wrote (seed {self.seed})")
        if isinstance(given, (str, os.PathLike)):
            return self._of_text(load_text(given), f"'{Path(given).name}'")
        return self._of_items(_column(given))

    def _examples(self, program: Program) -> CalibrationData:
        """Data for a model that reads no tokens."""
        found = self.examples if self.given is None else self.given
        if found is None or isinstance(found, (str, os.PathLike)):
            raise DataError(
                f"'{program.provenance.name}' reads no tokens: text cannot calibrate it",
                remedy="pass calibration=[inputs, ...], each as the model is called",
            )
        return ExampleInputs(list(found) if isinstance(found, list) else [found])

    def _of_items(self, items: Sequence[Any]) -> CalibrationData:
        if not items:
            raise DataError("the calibration data is empty", remedy=f"give {_WAYS}")
        if all(isinstance(item, str) for item in items):
            return self._of_text("\n\n".join(items), f"{len(items)} texts")
        if any(isinstance(item, (Mapping, tuple)) for item in items):
            return ExampleInputs(items)
        rows = [_ids(item) for item in items]
        if len(rows) > 1 and len({row.shape for row in rows}) == 1:
            return TokenWindows(np.stack(rows)[: self.samples], "the given tokens")
        return self._of_tokens(np.concatenate(rows), "the given tokens")

    def _of_text(self, text: str, source: str) -> CalibrationData:
        if self.tokenize is None:
            raise DataError(
                "the model has no tokenizer: text cannot calibrate it",
                remedy="pass token ids, or save a tokenizer beside the model",
            )
        return self._of_tokens(np.asarray(self.tokenize(text), dtype=np.int64), source)

    def _of_tokens(self, tokens: TokenArray, source: str) -> CalibrationData:
        return TokenWindows(windows(tokens, self.length, self.samples * self.length), source)


def _column(given: Any) -> Sequence[Any]:
    """The items of what the user gave: of a dataset, those of its column of text or tokens."""
    names = getattr(given, "column_names", None)
    if names is None:
        if isinstance(given, (Tensor, np.ndarray)):
            return [given] if given.ndim == 1 else list(given)
        return list(given)
    for name in ("input_ids", "text"):
        if name in names:
            return list(given[name])
    raise DataError(
        f"the dataset has no column 'text' or 'input_ids', only {', '.join(map(repr, names))}",
        remedy="rename the column, or pass its values as a list",
    )


def _ids(item: Any) -> TokenArray:
    array = np.asarray(item)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"calibration data holds a {type(item).__name__} that is neither text nor tokens",
            remedy=f"give {_WAYS}",
        )
    return array.astype(np.int64)
