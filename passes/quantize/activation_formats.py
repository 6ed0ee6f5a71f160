"""What activations are rounded to: how such formats are called, their grids, and their nodes.

| name | codes |
|---|---|
| ``int2`` ... ``int8`` | evenly spaced, symmetric |
| ``int2-asym`` ... ``int8-asym`` | evenly spaced, with zero points; for static scales |
| ``fp8``, or ``e4m3`` | 8-bit floats up to 448, saturating |
| ``fp4``, or ``e2m1`` | 4-bit floats: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives |
| ``e<E>m<M>`` | floats of a sign, E exponent (1 to 5) and M mantissa bits, 3 to 8 in all |
| ``fp3-searched`` ... ``fp8-searched`` | floats split as loses least on calibration data |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError, suggest
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.lookup.reference import lookup
from qcompile.kernels.quantize.reference import dynamic_scale, quantize
from qcompile.kernels.quantize_float.reference import float_scale, largest_level, quantize_float

T = TypeVar("T", Tensor, fx.Node)


@dataclass(frozen=True, eq=False)
class Grid(Generic[T]):
    """Where the codes of a value stand: numbers, or the nodes that give them.

    Attributes:
        scale: ``[G]`` floating, or with leading dimensions as those of the value.
        zero_point: Code of the value 0, shaped as the scale; None where codes are symmetric.
    """

    scale: T
    zero_point: T | None = None


def store_grid(editor: Editor, stem: str, grid: Grid[Tensor]) -> Grid[fx.Node]:
    """Puts a static grid among the weights, as ``<stem>.input_scale`` and ``.input_zero_point``."""

    def put(part: str, numbers: Tensor) -> fx.Node:
        name = f"{stem}.input_{part}"
        editor.program.weights.put(name, numbers)
        return editor.weight(name)

    scale = put("scale", grid.scale)
    return Grid(scale, None if grid.zero_point is None else put("zero_point", grid.zero_point))


class ActivationChoice(ABC):
    """What a recipe asks for. `str` gives the canonical name."""

    @property
    @abstractmethod
    def candidates(self) -> tuple[ActivationFormat, ...]:
        """The formats that it may become; several are chosen from by calibration data."""


class ActivationFormat(ActivationChoice):
    """Codes of activations."""

    @property
    def candidates(self) -> tuple[ActivationFormat, ...]:
        """Itself."""
        return (self,)

    @property
    @abstractmethod
    def has_zero_point(self) -> bool:
        """Whether its grids have zero points, so that scales must be static."""

    @abstractmethod
    def grid(self, low: Tensor, high: Tensor) -> Grid[Tensor]:
        """The grid that spans a range and zero.

        Args:
            low: Least value of each group, ``[G]`` floating.
            high: Largest value of each group, ``[G]``.

        Returns:
            Scale ``[G]`` float32, 1 for an empty range; zero point ``[G]`` uint8 or None.
        """

    @abstractmethod
    def covering(self, x: Tensor, group_size: int) -> Grid[Tensor]:
        """The symmetric grid that covers each group of values ``[..., K]``, ``[..., G]``."""

    @abstractmethod
    def round(self, x: Tensor, grid: Grid[Tensor], group_size: int = 0) -> Tensor:
        """Values to the nearest ones of a grid."""

    @abstractmethod
    def measure(self, editor: Editor, x: fx.Node, group_size: int) -> Grid[fx.Node]:
        """Inserts what finds `covering` at run time."""

    @abstractmethod
    def emit(self, editor: Editor, x: fx.Node, grid: Grid[fx.Node], group_size: int) -> fx.Node:
        """Inserts the rounding of a value to codes and back."""


@dataclass(frozen=True)
class IntegerActivations(ActivationFormat):
    """Evenly spaced values, ``(code - zero_point) * scale``.

    Attributes:
        bits: Width of the codes, 2 to 8.
        symmetric: Whether codes go from ``1 - 2^(bits-1)`` to ``2^(bits-1) - 1``, without a zero
            point, in place of 0 to ``2^bits - 1``.
    """

    bits: int
    symmetric: bool = True

    def __str__(self) -> str:
        return f"int{self.bits}{'' if self.symmetric else '-asym'}"

    @property
    def has_zero_point(self) -> bool:
        """Whether codes are asymmetric."""
        return not self.symmetric

    def grid(self, low: Tensor, high: Tensor) -> Grid[Tensor]:
        """See `ActivationFormat.grid`."""
        if self.symmetric:
            return _symmetric_grid(low, high, 2 ** (self.bits - 1) - 1)
        least, most = low.double().clamp(max=0), high.double().clamp(min=0)
        scale = (most - least) / (2**self.bits - 1)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return Grid(scale.float(), (-least / scale).round().to(torch.uint8))

    def covering(self, x: Tensor, group_size: int) -> Grid[Tensor]:
        """See `ActivationFormat.covering`."""
        return Grid(dynamic_scale(x, self.bits, group_size))

    def round(self, x: Tensor, grid: Grid[Tensor], group_size: int = 0) -> Tensor:
        """See `ActivationFormat.round`."""
        how = (grid.scale, grid.zero_point, self.bits, group_size)
        return dequantize(quantize(x, *how), *how)

    def measure(self, editor: Editor, x: fx.Node, group_size: int) -> Grid[fx.Node]:
        """One `qc.dynamic_scale`."""
        return Grid(editor.call(dialect.dynamic_scale, x, self.bits, group_size))

    def emit(self, editor: Editor, x: fx.Node, grid: Grid[fx.Node], group_size: int) -> fx.Node:
        """A `qc.quantize` and a `qc.dequantize`."""
        how = (grid.scale, grid.zero_point, self.bits, group_size)
        return editor.call(dialect.dequantize, editor.call(dialect.quantize, x, *how), *how)


@dataclass(frozen=True)
class FloatActivations(ActivationFormat):
    """Small floats times a scale, which is what others call a real-valued exponent bias.

    Attributes:
        levels: The table: ``"e2m1"``, ``"e4m3"``.
    """

    levels: str

    def __str__(self) -> str:
        return self.levels

    @property
    def has_zero_point(self) -> bool:
        """Never."""
        return False

    def grid(self, low: Tensor, high: Tensor) -> Grid[Tensor]:
        """See `ActivationFormat.grid`."""
        return _symmetric_grid(low, high, largest_level(self.levels))

    def covering(self, x: Tensor, group_size: int) -> Grid[Tensor]:
        """See `ActivationFormat.covering`."""
        return Grid(float_scale(x, self.levels, group_size))

    def round(self, x: Tensor, grid: Grid[Tensor], group_size: int = 0) -> Tensor:
        """See `ActivationFormat.round`."""
        how = (grid.scale, self.levels, group_size)
        return lookup(quantize_float(x, *how), *how)

    def measure(self, editor: Editor, x: fx.Node, group_size: int) -> Grid[fx.Node]:
        """One `qc.float_scale`."""
        return Grid(editor.call(dialect.float_scale, x, self.levels, group_size))

    def emit(self, editor: Editor, x: fx.Node, grid: Grid[fx.Node], group_size: int) -> fx.Node:
        """A `qc.quantize_float` and a `qc.lookup`."""
        how = (grid.scale, self.levels, group_size)
        return editor.call(dialect.lookup, editor.call(dialect.quantize_float, x, *how), *how)


def _symmetric_grid(low: Tensor, high: Tensor, largest: float) -> Grid[Tensor]:
    scale = torch.maximum(low.double().abs(), high.double().abs()) / largest
    return Grid(torch.where(scale == 0, torch.ones_like(scale), scale).float())


_MOST_EXPONENT_BITS = 5


@dataclass(frozen=True)
class SearchedFloats(ActivationChoice):
    """Small floats whose bits are split into exponent and mantissa as loses least.

    Attributes:
        bits: Width of the codes, 3 to 8.

    Source: Liu et al. 2023, "LLM-FP4" (arXiv 2310.16836), section 3.
    """

    bits: int

    def __str__(self) -> str:
        return f"fp{self.bits}-searched"

    @property
    def candidates(self) -> tuple[ActivationFormat, ...]:
        """All splits, by falling precision of the largest values."""
        exponents = range(1, min(self.bits - 1, _MOST_EXPONENT_BITS) + 1)
        return tuple(FloatActivations(f"e{e}m{self.bits - 1 - e}") for e in exponents)


_SEARCHED = tuple(map(SearchedFloats, range(3, 9)))

INTEGERS: tuple[ActivationFormat, ...] = (
    *(IntegerActivations(bits) for bits in range(2, 9)),
    *(IntegerActivations(bits, symmetric=False) for bits in range(2, 9)),
)
"""Evenly spaced codes, symmetric and not."""

FLOATS: tuple[ActivationChoice, ...] = (
    *(format for choice in _SEARCHED for format in choice.candidates),
    *_SEARCHED,
)
"""Small floats, and choices of these."""

ACTIVATION_FORMATS: Mapping[str, ActivationChoice] = MappingProxyType(
    {str(format): format for format in (*INTEGERS, *FLOATS)}
)
"""All that a recipe can ask for, by canonical name."""

_ALIASES = {"fp4": "e2m1", "fp8": "e4m3"}


def parse_activation_format(name: str) -> ActivationChoice:
    """The format of a name, or what it leaves to choose from.

    Raises:
        RecipeError: There is none.
    """
    found = ACTIVATION_FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        known = (*ACTIVATION_FORMATS, *_ALIASES)
        raise RecipeError(f"activations cannot be '{name}'", remedy=suggest(name, known))
    return found
