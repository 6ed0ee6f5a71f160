"""Floats as they are, in 16 or 32 bits: what a part of a split weight may be stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.errors import ModelError
from qcompile.formats.base import Format, QuantizedWeight, StoredWeight
from qcompile.formats.grid import ScaleSearch, require_finite
from qcompile.formats.scales import SCALE_DTYPES
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec

_DTYPES = frozenset(SCALE_DTYPES.values())
_cast = torch.ops.aten._to_copy.default


@dataclass(frozen=True)
class DenseFormat(Format):
    """weight = the stored number.

    Attributes:
        dtype: float16, bfloat16 or float32.
    """

    dtype: torch.dtype = torch.float16

    @property
    def name(self) -> str:
        """``fp16``, ``bf16`` or ``fp32``."""
        return next(name for name, dtype in SCALE_DTYPES.items() if dtype == self.dtype)

    @property
    def group_size(self) -> int:
        """1: no weight shares anything with another."""
        return 1

    def encode(
        self, weight: Tensor, *, scale_search: ScaleSearch = "absmax", name: str = "weight"
    ) -> QuantizedWeight:
        """The nearest numbers of the type; see `Format.encode`.

        Raises:
            ModelError: The weight is not finite, or too large for the type.
        """
        del scale_search
        require_finite(weight, name)
        values = weight.to(self.dtype)
        if not bool(values.isfinite().all()):
            raise ModelError(
                f"'{name}' has values too large for {self.name}",
                remedy="store its outliers as bf16",
            )
        return QuantizedWeight(self, tuple(weight.shape), {"values": values})

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K]."""
        return quantized.tensors["values"].to(torch.float32)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """``values`` [..., K]."""
        return {"values": TensorSpec(shape, self.dtype)}

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The values count as codes."""
        return {"codes": self.tensors(shape)["values"].bytes * 8}

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """One cast to float32."""
        return editor.call(_cast, tensors["values"], dtype=torch.float32)

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a cast of stored values gives."""
        if node.target != _cast:
            return None
        values = node.args[0]
        if not isinstance(values, fx.Node) or values.op != "get_attr":
            return None
        dtype = values.meta["val"].dtype
        return StoredWeight(cls(dtype), {"values": values}, node) if dtype in _DTYPES else None
