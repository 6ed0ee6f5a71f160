"""What a method is: it chooses the codes of one weight, given what was seen of its inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from qcompile.calibration.statistics import Statistic
from qcompile.errors import RecipeError
from qcompile.formats import Format, QuantizedWeight
from qcompile.formats.base import ScalarFormat
from qcompile.formats.grid import Grid, ScaleSearch
from qcompile.passes.quantize.methods.hessian import Inputs


@dataclass(frozen=True, eq=False)
class Task:
    """One weight to quantize.

    Attributes:
        name: What messages call the weight.
        weight: float32 [N, K], finite.
        format: What is stored.
        scale_search: How scales are chosen.
        inputs: What was seen of its inputs; None for methods that ask for no statistics.
        alone: Whether it is a weight of its own, which may be stored in any format, and not one
            of a stack that shares a format.
    """

    name: str
    weight: Tensor
    format: Format
    scale_search: ScaleSearch
    inputs: Inputs | None = None
    alone: bool = True

    @property
    def seen(self) -> Inputs:
        """What was seen of its inputs, where the method asked for it."""
        assert self.inputs is not None
        return self.inputs

    @property
    def grid(self) -> Grid:
        """The arithmetic of the format, bound to the weight.

        Raises:
            RecipeError: The format has none: its codes are not chosen one by one.
        """
        if not isinstance(self.format, ScalarFormat):
            raise RecipeError(
                f"format {self.format} of '{self.name}' does not store one code per weight",
                remedy="use an integer or lookup format with this method",
            )
        return self.format.grid.bind(self.weight, self.name)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method made of a weight.

    Attributes:
        weight: The tensors that stand for it.
        notes: What the user should know, one clause each.
    """

    weight: QuantizedWeight
    notes: tuple[str, ...] = field(default=())


class Method(ABC):
    """A way to choose codes. Subclasses are frozen dataclasses; their fields are their options.

    Attributes:
        statistics: What it needs to know of a weight's inputs; nothing for data-free methods.
    """

    statistics: ClassVar[tuple[type[Statistic], ...]] = ()

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration data."""
        return bool(self.statistics)

    @abstractmethod
    def quantize(self, task: Task) -> Outcome:
        """Chooses codes, on the calling thread.

        Raises:
            ModelError: The weight, or what is known of its inputs, cannot be worked with.
            RecipeError: The format is none that the method can choose codes of.
        """
