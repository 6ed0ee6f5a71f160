"""Calibration data: what a program is run on while statistics are collected."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qcompile.calibration.data import TokenArray
from qcompile.errors import DataError
from qcompile.ir.program import Program


class CalibrationData(ABC):
    """Inputs for a program, cut into micro-batches.

    Attributes:
        description: One line for the report: what it is and how much of it.
    """

    description: str

    @abstractmethod
    def batches(self, program: Program, tokens: int) -> list[list[Tensor]]:
        """One tensor per placeholder of the program, for each micro-batch.

        Args:
            program: Whose inputs they are.
            tokens: The most tokens in a micro-batch, where the data can be cut.

        Raises:
            ModelError: They do not fit the program's signature.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all values, equal for equal data."""


class TokenWindows(CalibrationData):
    """Windows of text for language models.

    Args:
        tokens: int64 [windows, length].
        source: Where they come from, for the report.

    Raises:
        DataError: There is no window.
    """

    def __init__(self, tokens: TokenArray, source: str = "tokens") -> None:
        if tokens.ndim != 2 or not tokens.size:
            raise DataError(
                f"calibration tokens have shape {list(tokens.shape)}, not [windows, length]",
                remedy="give at least one window of at least one token",
            )
        self.tokens = tokens
        self.description = f"{tokens.shape[0]} x {tokens.shape[1]} tokens of {source}"

    def batches(self, program: Program, tokens: int) -> list[list[Tensor]]:
        """Consecutive windows; see `CalibrationData.batches`."""
        rows = max(1, tokens // self.tokens.shape[1])
        ids = torch.from_numpy(self.tokens)
        return [program.bind(part) for part in ids.split(rows)]

    def fingerprint(self) -> str:
        """A hash of shape and tokens."""
        digest = hashlib.sha256(f"tokens:{self.tokens.shape}".encode())
        digest.update(np.ascontiguousarray(self.tokens).tobytes())
        return digest.hexdigest()


class ExampleInputs(CalibrationData):
    """Inputs of any program, each as the model was called when it was captured.

    Args:
        samples: One per micro-batch: a tensor, a tuple of arguments, or a mapping of keyword
            arguments.

    Raises:
        DataError: There is no sample.
    """

    def __init__(self, samples: Sequence[Any]) -> None:
        if not samples:
            raise DataError("there are no calibration samples", remedy="give at least one")
        self.samples = list(samples)
        self.description = f"{len(self.samples)} example input{'s' * (len(self.samples) > 1)}"

    def batches(self, program: Program, tokens: int) -> list[list[Tensor]]:
        """One micro-batch per sample; see `CalibrationData.batches`."""
        del tokens
        return [_bind(program, sample) for sample in self.samples]

    def fingerprint(self) -> str:
        """A hash of all tensors."""
        digest = hashlib.sha256(b"examples")
        leaves, structure = pytree.tree_flatten(self.samples)
        digest.update(repr(structure).encode())
        for value in leaves:
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)}:{value.dtype}".encode())
                content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(content.numpy().tobytes())
            else:
                digest.update(repr(value).encode())
        return digest.hexdigest()


def _bind(program: Program, sample: Any) -> list[Tensor]:
    if isinstance(sample, dict):
        return program.bind(**sample)
    return program.bind(*(sample if isinstance(sample, (tuple, list)) else (sample,)))
