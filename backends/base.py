"""What a target is: what it can run, and how a program becomes files that it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from torch import fx

from qcompile.formats.base import Format
from qcompile.ir.program import Program
from qcompile.manifest import Signature
from qcompile.passes.infra import Context
from qcompile.progress import Progress


@dataclass(frozen=True)
class Finding:
    """A layer that a target cannot run as it is asked to.

    Attributes:
        layer: The layer, by its weight's name or its module path.
        reason: Why not, one clause.
        remedy: What the user can do about it.
    """

    layer: str
    reason: str
    remedy: str | None = None

    def __str__(self) -> str:
        remedy = "" if self.remedy is None else f" ({self.remedy})"
        return f"{self.layer}: {self.reason}{remedy}"


def _supported(_: object) -> str | None:
    return None


@dataclass(frozen=True)
class Capabilities:
    """What a target can run, in a form that can be asked before anything is computed.

    The predicates give None for yes, and else the reason why not, one clause.

    Attributes:
        weight_format: Whether a linear layer's weight may be stored in a format.
        embedding_format: The same for tables that rows are gathered from.
        activation_formats: Names of the formats that inputs of quantized layers may be rounded to.
        sparse_floats: Whether floats may stand beside some codes of a linear layer's weight.
        cache_formats: Names of the formats that keys and values may be kept in, beside floats.
        barrier: Whether a call that the dialect does not know can be emitted.
    """

    weight_format: Callable[[Format], str | None]
    embedding_format: Callable[[Format], str | None]
    activation_formats: frozenset[str] = field(default_factory=frozenset)
    sparse_floats: bool = False
    cache_formats: frozenset[str] = field(default_factory=frozenset)
    barrier: Callable[[fx.Node], str | None] = _supported


@dataclass(frozen=True)
class Packed:
    """What `Target.pack` wrote, as far as the manifest must say it.

    Attributes:
        signature: Inputs and outputs of the compiled model.
        kernel_layout_version: Layout of weights packed for qcompile's own kernels; None when the
            model needs none of them.
        tensor_bytes: Bytes of the weights as stored, by tensor name, each tensor once.
        notes: What a user may want to know of these files: one line each.
    """

    signature: Signature
    kernel_layout_version: int | None = None
    tensor_bytes: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Target(ABC):
    """A kind of machine, or of file, that programs are compiled for.

    Loading and running do not go through this class: they live in ``backends/<name>/runtime.py``,
    which must not import torch.

    Attributes:
        name: As the user writes it.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What it can run."""

    @abstractmethod
    def check(self, program: Program) -> list[Finding]:
        """Every layer of a program that this target could not run, without computing anything.

        Args:
            program: A program before or after lowering; it is not changed.
        """

    @abstractmethod
    def lower(self, program: Program, context: Context) -> Program:
        """The program in operators that the target runs; `program` itself is not changed.

        Raises:
            TargetError: Names a layer that the target cannot run.
        """

    @abstractmethod
    def pack(self, program: Program, directory: Path, progress: Progress) -> Packed:
        """Writes a lowered program.

        Args:
            program: What `lower` gave.
            directory: Exists and is empty; the caller moves it into place when all is written.
            progress: Told of the tensors written.

        Raises:
            TargetError: Names what cannot be written.
        """

    def predict_files(self, program: Program) -> dict[str, int] | None:
        """Bytes of the files that `pack` would write, by name, without reading a weight.

        Args:
            program: What `lower` gave of a program whose weights may be shapes only.

        Returns:
            None if the target cannot tell; the weights' own bits are counted then.
        """
        del program
        return None
