"""What a weight format is.

A format says which tensors stand for a weight, how many bits they take, and what values they
decode to. It does not say how codes are chosen: `Format.encode` is plain round-to-nearest, and
better algorithms produce the same `QuantizedWeight`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx

from qcompile.formats.grid import Grid, ScaleSearch
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec


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


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A quantized weight as it stands in a program's graph.

    Attributes:
        format: What its tensors mean.
        tensors: Name of each tensor, as in `Format.tensors`, to the `get_attr` node that names it.
        value: The node that decodes them.
        parts: The weights that it is put together from, if it is a split one.
    """

    format: Format
    tensors: Mapping[str, fx.Node]
    value: fx.Node
    parts: tuple[StoredWeight, ...] = ()

    @property
    def name(self) -> str:
        """The weight, by its name in the checkpoint."""
        tensor, node = next(iter(self.tensors.items()))
        return str(node.target).removesuffix(f".{tensor}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, [..., K]."""
        return tuple(int(size) for size in self.value.meta["val"].shape)


class Format(ABC):
    """A way of storing a weight [..., K] in few bits.

    A format stands on both sides of the graph: `emit` writes the nodes that decode a weight, and
    `recognize` finds a weight of this family in them again.
    """

    if TYPE_CHECKING:  # at run time a property here would be the default of subclasses' fields

        @property
        def group_size(self) -> int:
            """Weights that share a scale, along the last axis; 0 where all of a row do."""

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
    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Bits of information stored for a weight of a shape, by part, without any padding.

        The parts are those of `tensors`, ``"codes"`` among them, and tables that the format brings
        along.
        """

    @abstractmethod
    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """Writes the nodes that decode a weight where the editor stands.

        Args:
            editor: Of the program.
            tensors: Name of each of `tensors` to the `get_attr` node that names it.

        Returns:
            The node whose value is the weight, float32 [..., K].
        """

    @classmethod
    @abstractmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a node decodes, if its format is of this class: `emit` read backwards."""

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """All bits stored for a weight of a shape: codes and everything beside them."""
        return sum(self.bits_by_part(shape).values())

    def rows(self, quantized: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
        """The part of a quantized weight that stands for a range of its first axis.

        This default fits formats whose tensors share the weight's first axis, or have a first axis
        of 1 because they belong to all of it.
        """
        shape = (stop - start, *quantized.shape[1:])
        parts = {
            name: tensor if tensor.shape[0] == 1 else tensor[start:stop]
            for name, tensor in quantized.tensors.items()
        }
        return QuantizedWeight(self, shape, parts)

    def stack(self, matrices: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Matrices [N, K] of this format as one weight [E, N, K], such as those of experts.

        This default fits formats that store each matrix of a stack by itself.
        """
        first = matrices[0]
        tensors = {
            name: torch.stack([matrix.tensors[name] for matrix in matrices])
            for name in first.tensors
        }
        return QuantizedWeight(self, (len(matrices), *first.shape), tensors)

    def bits_per_weight(self, shape: tuple[int, ...]) -> float:
        """`stored_bits` divided by the number of weights."""
        return self.stored_bits(shape) / math.prod(shape)

    def __str__(self) -> str:
        return self.name


_MATRIX = 2
"""Axes of a matrix; weights with more are stacks of them."""


class ScalarFormat(Format):
    """A format that stores one code per weight, and decodes it with what its group shares."""

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The arithmetic of this format, for algorithms that choose codes themselves."""

    def encode(
        self, weight: Tensor, *, scale_search: ScaleSearch = "absmax", name: str = "weight"
    ) -> QuantizedWeight:
        """Rounds a weight to nearest; see `Format.encode`.

        Args:
            weight: [..., K], any float dtype.
            scale_search: How scales are chosen.
            name: What error messages call the weight.

        Raises:
            ModelError: The weight is not finite, or a scale is too large for its type.
        """
        if weight.ndim > _MATRIX:
            return self.stack(
                [
                    self.encode(matrix, scale_search=scale_search, name=f"{name}[{i}]")
                    for i, matrix in enumerate(weight)
                ]
            )
        tensors = self.grid.encode(weight, scale_search, name)
        return QuantizedWeight(self, tuple(weight.shape), tensors)
