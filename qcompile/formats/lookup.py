"""Codes of a table of levels, times scales: small floats, NF4, ternary and any other grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.formats.base import QuantizedWeight, ScalarFormat, StoredWeight
from qcompile.formats.lookup_grid import LookupGrid
from qcompile.formats.scales import (
    E4M3,
    E8M0,
    SCALE_STORAGES,
    BoundScales,
    ScaleStorage,
    recognize_scale,
)
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.lookup.levels import code_bits, levels
from qcompile.kernels.lookup.reference import lookup
from qcompile.kernels.quantize.groups import group_count

TRITS_PER_BYTE = 5
"""3^5 = 243 combinations fit a byte."""

_TERNARY = 3
_LARGE = 64.0


@dataclass(frozen=True)
class LookupFormat(ScalarFormat):
    """weight = levels[code] * scale, one scale per group of inputs.

    Attributes:
        table: Name of the levels, such as ``"nf4"`` or ``"e2m1"``, or the numbers themselves as
            `qcompile.kernels.lookup.levels.spell_levels` writes them.
        group_size: Weights that share a scale, along the last axis; the last group of a row may be
            short. 0 is one group per row (per output channel).
        scales: How scales are stored. Codes are chosen for the stored ones.

    Raises:
        RecipeError: If a field is out of its range.
    """

    table: str
    group_size: int = 0
    scales: ScaleStorage = SCALE_STORAGES["fp16"]

    def __post_init__(self) -> None:
        try:
            levels(self.table)
        except ValueError as error:
            raise RecipeError(str(error), remedy="write a format such as nf4-g64") from error
        if self.group_size < 0:
            raise RecipeError(
                f"a group size is positive, or 0 for one group per row, not {self.group_size}",
                remedy="write a format such as nf4-g64",
            )

    @property
    def name(self) -> str:
        """Such as ``nf4-g64-bf16``; what is left out is what the table comes with."""
        for name, format in STANDARD_FORMATS.items():
            if self == format:
                return name
        parts = [next((name for name, t in ALIASES.items() if t == self.table), self.table)]
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if self.scales != default_scales(self.table):
            parts.append(self.scales.name)
        return "-".join(parts)

    @property
    def grid(self) -> LookupGrid:
        """The arithmetic of this format, for algorithms that choose codes themselves."""
        return LookupGrid(self.table, self.group_size, BoundScales(self.scales))

    @property
    def levels(self) -> tuple[float, ...]:
        """The value of each code."""
        return levels(self.table)

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K]."""
        scale = self.scales.decode(quantized.tensors)
        return lookup(quantized.tensors["codes"], scale, self.table, self.group_size)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """``codes`` [..., K] uint8 and the tensors of the scales [..., G]."""
        grouped = (*shape[:-1], group_count(shape[-1], self.group_size))
        return {"codes": TensorSpec(shape, torch.uint8), **self.scales.specs(grouped)}

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Codes, scales, and the levels where they are numbers of this weight's own.

        Codes take whole bits, but three levels are stored five to a byte.
        """
        specs = self.tensors(shape)
        codes = specs.pop("codes").elements
        if len(self.levels) == _TERNARY:
            code_total = -(-codes // TRITS_PER_BYTE) * 8
        else:
            code_total = codes * code_bits(self.table)
        parts = {"codes": code_total}
        parts.update((name, spec.bytes * 8) for name, spec in specs.items())
        if self.table.startswith("("):
            parts["levels"] = len(self.levels) * 32
        return parts

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """One `qc.lookup`, and another one where scales are codes themselves."""
        scale = self.scales.emit(editor, tensors)
        return editor.call(dialect.lookup, tensors["codes"], scale, self.table, self.group_size)

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a `qc.lookup` of stored codes with scales decodes."""
        if node.target != dialect.lookup:
            return None
        codes, scale, table, group_size = node.args
        if not isinstance(codes, fx.Node) or codes.op != "get_attr":
            return None
        if not isinstance(scale, fx.Node) or (found := recognize_scale(scale)) is None:
            return None
        assert isinstance(table, str)
        assert isinstance(group_size, int)
        scales, tensors = found
        return StoredWeight(cls(table, group_size, scales), {"codes": codes, **tensors}, node)


def default_scales(table: str) -> ScaleStorage:
    """How the scales of a table are stored unless its format's name says otherwise.

    float16; but float32 for levels in the hundreds, whose scales would fall below float16's normal
    numbers.
    """
    largest = max(value for value in levels(table) if isfinite(value))
    return SCALE_STORAGES["fp32" if largest > _LARGE else "fp16"]


ALIASES: dict[str, str] = {"fp4": "e2m1", "fp8": "e4m3"}
"""Other names of tables, which canonical names use."""

STANDARD_FORMATS: dict[str, LookupFormat] = {
    "mxfp4": LookupFormat("e2m1", 32, E8M0),
    "mxfp6": LookupFormat("e2m3", 32, E8M0),
    "mxfp8": LookupFormat("e4m3", 32, E8M0),
    "nvfp4": LookupFormat("e2m1", 16, E4M3),
}
"""Formats whose group and scales are part of their name."""
