"""How the scales of lookup formats are stored: as floats, or as 8-bit codes of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.formats.grid import storable_scale
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.lookup.levels import levels
from qcompile.kernels.lookup.reference import lookup

SCALE_DTYPES: dict[str, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
"""Name of a scale type in a format's name to the type."""


OuterScales = Literal["weight", "row", "none"]
"""What shares an outer scale."""


class ScaleStorage(ABC):
    """How scales [..., G] are stored. What is shared by many scales is an *outer* scale."""

    @property
    @abstractmethod
    def outer_scales(self) -> OuterScales:
        """Which scales share an outer scale."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As it stands in the name of a format."""

    @abstractmethod
    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors that stand for scales of a shape [..., G]."""

    @abstractmethod
    def outer(self, ideal: Tensor) -> Tensor | None:
        """The outer scales for ideal scales [..., G] of a whole weight, or None."""

    @abstractmethod
    def storable(self, ideal: Tensor, outer: Tensor | None, name: str) -> Iterator[Tensor]:
        """What can be stored near an ideal scale: one choice, or the one below and the one above.

        Args:
            ideal: Float32 of any shape.
            outer: The outer scales, broadcast against `ideal`.
            name: What error messages call the weight.

        Yields:
            Float32, exactly as they decode, never 0.

        Raises:
            ModelError: A scale is too large for its type.
        """

    @abstractmethod
    def store(self, scale: Tensor, outer: Tensor | None) -> dict[str, Tensor]:
        """The tensors of scales [..., G] that `storable` gave."""

    @abstractmethod
    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The scales [..., G], floating."""

    @abstractmethod
    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """The node whose value is the scales."""


@dataclass(frozen=True)
class FloatScale(ScaleStorage):
    """Scales as float16, bfloat16 or float32 numbers: ``scale`` [..., G]."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """Such as ``fp16``."""
        return next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.dtype)

    @property
    def outer_scales(self) -> OuterScales:
        """None do."""
        return "none"

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """``scale``."""
        return {"scale": TensorSpec(shape, self.dtype)}

    def outer(self, ideal: Tensor) -> None:
        """None."""
        del ideal

    def storable(self, ideal: Tensor, outer: Tensor | None, name: str) -> Iterator[Tensor]:
        """The nearest."""
        del outer
        yield storable_scale(ideal, self.dtype, name)

    def store(self, scale: Tensor, outer: Tensor | None) -> dict[str, Tensor]:
        """``scale``."""
        del outer
        return {"scale": scale.to(self.dtype)}

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor itself."""
        return tensors["scale"]

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """The stored tensor itself."""
        del editor
        return tensors["scale"]


@dataclass(frozen=True)
class CodedScale(ScaleStorage):
    """Scales as 8-bit codes of a table of positive numbers, perhaps times outer scales.

    Tensors: ``scale`` [..., G] uint8, and ``outer_scale`` float32: [..., 1], one per row, or
    [..., 1, 1], one per matrix.

    Attributes:
        levels: Name of the table; see `qcompile.kernels.lookup.levels`.
        shared_by: What shares an outer scale.
    """

    levels: str
    shared_by: OuterScales

    @property
    def name(self) -> str:
        """``e8m0``, ``e4m3`` or, for whole numbers with an outer scale per row, ``dq``."""
        return "dq" if self.levels == "uint8" else self.levels

    @property
    def outer_scales(self) -> OuterScales:
        """As `shared_by` says."""
        return self.shared_by

    def specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """``scale``, and ``outer_scale`` where there is one."""
        specs = {"scale": TensorSpec(shape, torch.uint8)}
        if self.outer_scales == "row":
            specs["outer_scale"] = TensorSpec((*shape[:-1], 1), torch.float32)
        elif self.outer_scales == "weight":
            specs["outer_scale"] = TensorSpec((*shape[:-2], 1, 1)[-len(shape) :], torch.float32)
        return specs

    def outer(self, ideal: Tensor) -> Tensor | None:
        """What makes the largest scale of a row, or of all, the largest number of the table."""
        if self.outer_scales == "none":
            return None
        largest = ideal.amax(dim=-1, keepdim=True)
        if self.outer_scales == "weight":
            largest = largest.amax().reshape((1,) * ideal.ndim)
        outer = largest / self._codes_and_values()[1][-1]
        return torch.where(outer == 0, torch.ones_like(outer), outer)

    def storable(self, ideal: Tensor, outer: Tensor | None, name: str) -> Iterator[Tensor]:
        """The one below and the one above."""
        del name
        _, values = self._codes_and_values()
        relative = ideal if outer is None else ideal / outer
        above = torch.bucketize(relative, values).clamp_(max=len(values) - 1)
        for index in ((above - 1).clamp_(min=0), above):
            yield values[index] if outer is None else values[index] * outer

    def store(self, scale: Tensor, outer: Tensor | None) -> dict[str, Tensor]:
        """``scale``, and ``outer_scale`` where there is one."""
        codes, values = self._codes_and_values()
        relative = scale if outer is None else scale / outer
        # The quotient may be off by a rounding; halfway between neighbours nothing can go wrong.
        index = torch.bucketize(relative, (values[1:] + values[:-1]) / 2)
        tensors = {"scale": codes[index]}
        if outer is not None:
            tensors["outer_scale"] = outer
        return tensors

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """levels[code] * outer_scale, float32."""
        return lookup(tensors["scale"], tensors.get("outer_scale"), self.levels, 0)

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """One `qc.lookup`."""
        outer = tensors.get("outer_scale")
        return editor.call(dialect.lookup, tensors["scale"], outer, self.levels, 0)

    def _codes_and_values(self) -> tuple[Tensor, Tensor]:
        """The positive numbers of the table in ascending order, and their codes."""
        known = [(v, code) for code, v in enumerate(levels(self.levels)) if v > 0 and isfinite(v)]
        values, codes = zip(*sorted(known), strict=True)
        return torch.tensor(codes, dtype=torch.uint8), torch.tensor(values, dtype=torch.float32)


E8M0 = CodedScale("e8m0", "none")
"""Powers of two, as in the MX formats of the OCP."""
E4M3 = CodedScale("e4m3", "weight")
"""Eight-bit floats and one float32 for the whole weight, as in NVFP4."""
DOUBLE_QUANTIZED = CodedScale("uint8", "row")
"""Whole numbers of 8 bits and one float32 per row: QLoRA's double quantization."""

_CODED = (E8M0, E4M3, DOUBLE_QUANTIZED)


@dataclass(frozen=True, eq=False)
class BoundScales:
    """How the scales of one weight are stored, its outer scales chosen.

    Attributes:
        storage: How scales are stored.
        outer: Outer scales ``[N, 1]`` or ``[1, 1]`` float32; None where there are none, and as long
            as they are not chosen.
    """

    storage: ScaleStorage
    outer: Tensor | None = None

    @property
    def needs_outer(self) -> bool:
        """Whether there are outer scales to choose."""
        return self.storage.outer_scales != "none"

    def bind(self, ideal: Tensor) -> BoundScales:
        """With outer scales for the ideal scales ``[N, G]`` of a whole weight."""
        return replace(self, outer=self.storage.outer(ideal))

    def rows(self, start: int, stop: int) -> BoundScales:
        """Those of a range of rows."""
        if self.outer is None or self.outer.shape[0] == 1:
            return self
        return replace(self, outer=self.outer[start:stop])

    def storable(self, ideal: Tensor, name: str) -> Iterator[Tensor]:
        """What can be stored near ideal scales ``[N, ...]``; see `ScaleStorage.storable`."""
        outer = self.outer
        if self.needs_outer:
            if outer is None:
                raise ValueError("outer scales are those of a weight: bind the grid to it first")
            outer = outer.reshape(-1, *(1,) * (ideal.ndim - 1))
        yield from self.storage.storable(ideal, outer, name)

    def store(self, scale: Tensor) -> dict[str, Tensor]:
        """The tensors of scales ``[..., G]`` that `storable` gave."""
        outer = self.outer
        if outer is not None:
            per_row = outer.shape[0] > 1
            shape = (*scale.shape[:-1], 1) if per_row else (1,) * scale.ndim
            outer = outer.reshape(shape)
        return self.storage.store(scale, outer)


SCALE_STORAGES: dict[str, ScaleStorage] = {
    **{name: FloatScale(dtype) for name, dtype in SCALE_DTYPES.items()},
    **{storage.name: storage for storage in _CODED},
}
"""Every way to store scales, by the name that it has in a format's."""


def recognize_scale(node: fx.Node) -> tuple[ScaleStorage, dict[str, fx.Node]] | None:
    """How scales are stored, and their tensors: `ScaleStorage.emit` read backwards."""
    if node.op == "get_attr":
        return FloatScale(node.meta["val"].dtype), {"scale": node}
    if node.target != dialect.lookup:
        return None
    codes, outer, table, _ = node.args
    storage = next((known for known in _CODED if known.levels == table), None)
    if storage is None or not isinstance(codes, fx.Node):
        return None
    tensors = {"scale": codes}
    if isinstance(outer, fx.Node):
        tensors["outer_scale"] = outer
    return storage, tensors
