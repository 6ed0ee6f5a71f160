"""Integers of 1 to 8 bits in groups along the input axis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.formats.base import QuantizedWeight, ScalarFormat, StoredWeight
from qcompile.formats.integer_grid import IntegerGrid
from qcompile.formats.scales import SCALE_DTYPES
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.groups import group_count

FLOAT_ZERO_POINTS = "asym16"
"""How the name of a format says that zero points are 16-bit floats."""


@dataclass(frozen=True)
class IntegerFormat(ScalarFormat):
    """weight = (code - zero_point) * scale, one scale (and zero point) per group of inputs.

    Codes are unsigned, 0 to 2^bits - 1. A symmetric format has no zero points: they are all
    2^(bits-1), so that the lowest code has no opposite; a scale may then be *negative*, which
    puts that extra level on the side where the group needs it.

    Zero points are codes, so that 0 is one of the values; or 16-bit floats (Badri and Shaji 2023,
    HQQ), with which the grid of a group lies wherever its weights do.

    Attributes:
        bits: Width of a code, 1 to 8.
        group_size: Weights that share a scale, along the last axis; the last group of a row may
            be short. 0 is one group per row (per output channel).
        symmetric: Whether zero points are absent.
        scale_dtype: float16, bfloat16 or float32. Codes are chosen after scales are rounded to it.
        zero_dtype: Of the zero points, where there are any: uint8, whole numbers of as many bits as
            the codes, or float16.

    Raises:
        RecipeError: If a field is out of its range.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16
    zero_dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise RecipeError(
                f"integer formats have 1 to 8 bits, not {self.bits}",
                remedy="write a format such as int4-g64 or int8",
            )
        if self.group_size < 0:
            raise RecipeError(
                f"a group size is positive, or 0 for one group per row, not {self.group_size}",
                remedy="write a format such as int4-g64",
            )
        if self.scale_dtype not in SCALE_DTYPES.values():
            raise RecipeError(
                f"scales are stored as {', '.join(SCALE_DTYPES)}, not as {self.scale_dtype}"
            )
        if self.zero_dtype not in (torch.uint8, torch.float16):
            raise RecipeError(f"zero points are uint8 or float16, not {self.zero_dtype}")
        if self.symmetric and self.has_float_zero_points:
            raise RecipeError(
                "symmetric formats have no zero points to store as floats",
                remedy=f"write a format such as int4-g64-{FLOAT_ZERO_POINTS}",
            )

    @property
    def has_float_zero_points(self) -> bool:
        """Whether zero points need be no codes."""
        return self.zero_dtype.is_floating_point

    @property
    def name(self) -> str:
        """Such as ``int4-g64-asym-bf16``; what is left out is per row, symmetric, fp16."""
        parts = [f"int{self.bits}"]
        if self.group_size:
            parts.append(f"g{self.group_size}")
        if not self.symmetric:
            parts.append(FLOAT_ZERO_POINTS if self.has_float_zero_points else "asym")
        parts += [
            name
            for name, dtype in SCALE_DTYPES.items()
            if dtype == self.scale_dtype and dtype != torch.float16
        ]
        return "-".join(parts)

    @property
    def grid(self) -> IntegerGrid:
        """The arithmetic of this format, for algorithms that choose codes themselves."""
        return IntegerGrid(
            self.bits, self.group_size, self.symmetric, self.scale_dtype, self.zero_dtype
        )

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K]."""
        tensors = quantized.tensors
        return dequantize(
            tensors["codes"],
            tensors["scale"],
            tensors.get("zero_point"),
            self.bits,
            self.group_size,
        )

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Codes [..., K] uint8, one scale and (asymmetric) zero point per group [..., G]."""
        grouped = (*shape[:-1], group_count(shape[-1], self.group_size))
        specs = {
            "codes": TensorSpec(shape, torch.uint8),
            "scale": TensorSpec(grouped, self.scale_dtype),
        }
        if not self.symmetric:
            specs["zero_point"] = TensorSpec(grouped, self.zero_dtype)
        return specs

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """`bits` for each code and each zero point that is one, and the floats."""
        specs = self.tensors(shape)
        parts = {"codes": specs["codes"].elements * self.bits, "scale": specs["scale"].bytes * 8}
        if "zero_point" in specs:
            width = 16 if self.has_float_zero_points else self.bits
            parts["zero_point"] = specs["zero_point"].elements * width
        return parts

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """One `qc.dequantize`."""
        return editor.call(
            dialect.dequantize,
            tensors["codes"],
            tensors["scale"],
            tensors.get("zero_point"),
            self.bits,
            self.group_size,
        )

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a `qc.dequantize` of stored codes decodes."""
        if node.target != dialect.dequantize:
            return None
        codes, scale, zero_point, bits, group_size = node.args
        if not isinstance(codes, fx.Node) or codes.op != "get_attr":
            return None  # of activations
        if not isinstance(scale, fx.Node) or scale.op != "get_attr":
            return None
        assert isinstance(bits, int)
        assert isinstance(group_size, int)
        tensors = {"codes": codes, "scale": scale}
        format = cls(bits, group_size, zero_point is None, scale.meta["val"].dtype)
        if isinstance(zero_point, fx.Node):
            tensors["zero_point"] = zero_point
            format = replace(format, zero_dtype=zero_point.meta["val"].dtype)
        return StoredWeight(format, tensors, node)
