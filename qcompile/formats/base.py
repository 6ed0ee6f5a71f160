"""What a weight format is.

A format says which tensors stand for a weight, how many bits they take, and what values they
decode to. It does not say how codes are chosen: `Format.encode` is plain round-to-nearest, and
better algorithms produce the same `QuantizedWeight`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qcompile.ir.weights import TensorSpec

ScaleSearch = Literal["absmax", "mse"]
"""How a scale is chosen: from the extremes of its group, or by least squared error over a grid of
narrower ranges."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The tensors that stand for one weight.

    Attributes:
        format: What the tensors mean.
        shape: Shape of the weight, [..., K].
        tensors: Name to tensor, exactly the names, shapes and dtypes of `format.tensors(shape)`.
    """

    format: Format
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]


class Format(ABC):
    """A way of storing a weight [..., K] in few bits."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The canonical name, which `qcompile.formats.parse_format` reads back."""

    @abstractmethod
    def encode(
        self, weight: Tensor, *, scale_search: ScaleSearch = "absmax", name: str = "weight"
    ) -> QuantizedWeight:
        """Rounds a weight to the nearest values that the format can store.

        Args:
            weight: [..., K], any float dtype.
            scale_search: How scales are chosen.
            name: What error messages call the weight.

        Raises:
            ModelError: The weight has values that are not finite, or that the format cannot reach.
        """

    @abstractmethod
    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The values that are stored, float32 [..., K]: the authority that kernels must match."""

    @abstractmethod
    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors that stand for a weight of a shape in a program, before any packing."""

    @abstractmethod
    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Bits of information stored for a weight of a shape: codes and everything beside them."""

    def rows(self, quantized: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
        """The part of a quantized weight that stands for a range of its first axis.

        This default fits formats whose tensors all share the weight's first axis.
        """
        shape = (stop - start, *quantized.shape[1:])
        parts = {name: tensor[start:stop] for name, tensor in quantized.tensors.items()}
        return QuantizedWeight(self, shape, parts)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """`stored_bits` divided by the number of weights."""
        return self.stored_bits(shape) / math.prod(shape)

    def __str__(self) -> str:
        return self.name
