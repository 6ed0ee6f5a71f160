"""Integers in groups whose scales are integers too: one float for each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.formats.base import QuantizedWeight, ScalarFormat, StoredWeight
from qcompile.formats.grid import Grid, GroupParameters, ScaleSearch, require_finite
from qcompile.formats.integer import FLOAT_ZERO_POINTS, IntegerFormat
from qcompile.formats.integer_grid import IntegerGrid
from qcompile.formats.scales import DOUBLE_QUANTIZED, BoundScales, recognize_scale
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.quantize.groups import group_count, split_groups

INTEGER_SCALES = "intscale"
"""How the name of a format says so."""


@dataclass(frozen=True)
class IntegerScaleFormat(ScalarFormat):
    """weight = (code - zero_point) * integer * row scale: sums over groups stay integers.

    A product of int8 activations with such a weight converts to floats once for a row, and not once
    for a group. Integers are those of 8 bits, and positive: symmetric groups, whose float scales
    may be negative, lose the level that this spares.

    Attributes:
        base: The integer format whose scales become integers; it has groups.

    Raises:
        RecipeError: If the format has one group per row, or zero points that are floats.

    Source: Li et al. 2024, "Integer Scale: A Free Lunch for Faster Fine-grained Quantization of
    LLMs"; here the factor between integers and floats is that of a row, not of the layer.
    """

    base: IntegerFormat

    def __post_init__(self) -> None:
        if not self.base.group_size:
            raise RecipeError(
                f"format {self.base} has one scale per row, which stays a float",
                remedy=f"write a group size, such as {self.base}-g64-{INTEGER_SCALES}",
            )
        if self.base.has_float_zero_points:
            raise RecipeError(
                f"format {self.base} has zero points that are floats, and with {INTEGER_SCALES} "
                "sums over groups are whole numbers",
                remedy=f"write asym in place of {FLOAT_ZERO_POINTS}",
            )
        if self.base.scale_dtype != torch.float32:
            object.__setattr__(self, "base", replace(self.base, scale_dtype=torch.float32))

    @property
    def name(self) -> str:
        """Such as ``int4-g64-asym-intscale``."""
        return f"{replace(self.base, scale_dtype=torch.float16)}-{INTEGER_SCALES}"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.base.bits

    @property
    def group_size(self) -> int:
        """Weights that share an integer."""
        return self.base.group_size

    @property
    def symmetric(self) -> bool:
        """Whether zero points are absent."""
        return self.base.symmetric

    @property
    def grid(self) -> IntegerScaleGrid:
        """The arithmetic of this format, for algorithms that choose codes themselves."""
        return IntegerScaleGrid(self.base.grid)

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K]."""
        scale = DOUBLE_QUANTIZED.decode(quantized.tensors)
        tensors = {**quantized.tensors, "scale": scale}
        return self.base.decode(QuantizedWeight(self.base, quantized.shape, tensors))

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Codes and zero points of the base, integers [..., G] uint8, row scales [..., 1]."""
        grouped = (*shape[:-1], group_count(shape[-1], self.group_size))
        return {**self.base.tensors(shape), **DOUBLE_QUANTIZED.specs(grouped)}

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Those of the base, 8 for each integer, and the row scales."""
        specs = self.tensors(shape)
        parts = self.base.bits_by_part(shape)
        return parts | {name: specs[name].bytes * 8 for name in ("scale", "outer_scale")}

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """One `qc.lookup` for the scales, one `qc.dequantize`."""
        scale = DOUBLE_QUANTIZED.emit(editor, tensors)
        return self.base.emit(editor, {**tensors, "scale": scale})

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a `qc.dequantize` with scales of this kind decodes."""
        if node.target != dialect.dequantize:
            return None
        codes, scale, zero_point, bits, group_size = node.args
        if not isinstance(codes, fx.Node) or codes.op != "get_attr":
            return None
        found = recognize_scale(cast(fx.Node, scale))
        if found is None or found[0] != DOUBLE_QUANTIZED:
            return None
        tensors = {"codes": codes, **found[1]}
        if isinstance(zero_point, fx.Node):
            tensors["zero_point"] = zero_point
        assert isinstance(bits, int)
        assert isinstance(group_size, int)
        base = IntegerFormat(bits, group_size, zero_point is None, torch.float32)
        return StoredWeight(cls(base), tensors, node)


@dataclass(frozen=True, eq=False)
class IntegerScaleGrid(Grid):
    """The values of an integer grid at integer multiples of a row's scale.

    The row's scale makes the widest group's that `base` would choose the integer 255.

    Attributes:
        base: The grid with float scales.
        scales: How they are stored, with the row scales of the weight that the grid is bound to.
    """

    base: IntegerGrid
    scales: BoundScales = field(default_factory=lambda: BoundScales(DOUBLE_QUANTIZED))

    @property
    def group_size(self) -> int:  # type: ignore[override]  # other grids have it as a field
        """Weights that share an integer."""
        return self.base.group_size

    def bind(self, weight: Tensor, name: str = "weight") -> IntegerScaleGrid:
        """With row scales chosen; see `Grid.bind`.

        Raises:
            ModelError: The weight is not finite.
        """
        rows = weight.reshape(-1, weight.shape[-1]).to(torch.float32)
        require_finite(rows, name)
        groups = split_groups(rows, self.group_size)
        empty = groups.abs().amax(-1, keepdim=True) == 0
        widest = torch.stack(
            [found.scale.abs() for found in self.base.candidates(groups, "absmax", name)]
        ).amax(0)
        return replace(self, scales=self.scales.bind(widest.masked_fill(empty, 0).squeeze(-1)))

    def rows(self, start: int, stop: int) -> IntegerScaleGrid:
        """The bound grid of a range of rows."""
        return replace(self, scales=self.scales.rows(start, stop))

    def candidates(
        self, groups: Tensor, search: ScaleSearch, name: str
    ) -> Iterator[GroupParameters]:
        """Those of the base, at the integers below and above; see `Grid.candidates`."""
        for ideal in self.base.candidates(groups, search, name):
            for scale in self.scales.storable(ideal.scale.abs(), name):
                zero_point = ideal.zero_point
                if zero_point is not None:
                    low = zero_point * ideal.scale
                    zero_point = (low / scale).round_().clamp_(0, 2**self.base.bits - 1)
                yield GroupParameters(scale, zero_point)

    def nearest(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """Codes 0 to 2^bits - 1, uint8."""
        return self.base.nearest(values, parameters)

    def decode(self, codes: Tensor, parameters: GroupParameters) -> Tensor:
        """(codes - zero_point) * scale, float32."""
        return self.base.decode(codes, parameters)

    def round(self, values: Tensor, parameters: GroupParameters) -> Tensor:
        """The nearest storable values, without a detour over uint8."""
        return self.base.round(values, parameters)

    def store(self, codes: Tensor, parameters: GroupParameters) -> dict[str, Tensor]:
        """``codes``, ``scale``, ``outer_scale`` and, asymmetric, ``zero_point``."""
        tensors = self.base.store(codes, parameters)
        return {**tensors, **self.scales.store(parameters.scale)}
