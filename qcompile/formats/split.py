"""Weights whose input columns are divided among several formats.

A few columns matter more than the others, or less: outlier columns stay 16-bit floats beside
integers (OWQ, QUIK), salient groups take a bit more and others a bit less (SliM-LLM). Which columns
a part has is data of each weight; how many is part of the format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.formats.base import Format, QuantizedWeight, StoredWeight
from qcompile.formats.dense import DenseFormat
from qcompile.formats.grid import ScaleSearch, require_finite
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.lookup import LookupFormat
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec

PLACES = "places"
"""Name of the tensor that says where each column of the weight stands among the parts."""

_MOST_SHORT = 2**15
_FAMILIES: tuple[type[Format], ...] = (IntegerFormat, LookupFormat, DenseFormat)
_aten = torch.ops.aten


@dataclass(frozen=True)
class Percent:
    """A share of the blocks of a weight, rounded to whole ones and never to none."""

    value: float

    def of(self, blocks: int) -> int:
        """How many of `blocks` that is."""
        return max(1, round(blocks * self.value / 100))

    def __str__(self) -> str:
        return f"{self.value:g}%"


def spell_amount(amount: int | Percent) -> str:
    """As it stands in the name of a format: ``4x`` or ``1%``."""
    return f"{amount}x" if isinstance(amount, int) else str(amount)


@dataclass(frozen=True)
class Part:
    """A format beside the base.

    Attributes:
        format: What its columns are stored as.
        amount: How many blocks of columns it has, or the share of them.
    """

    format: Format
    amount: int | Percent

    def blocks(self, available: int) -> int:
        """How many of the blocks of a weight it has."""
        return self.amount if isinstance(self.amount, int) else self.amount.of(available)

    def __str__(self) -> str:
        return f"{spell_amount(self.amount)}{self.format}"


@dataclass(frozen=True)
class SplitFormat(Format):
    """A weight whose columns are divided among formats.

    Columns go in *blocks*: as many as all parts have in a group, so that groups stay whole; a
    16-bit float and a format with one group per row take single columns. A part stores its columns
    side by side, in an order of its own. A last block that is short belongs to the base.

    Tensors: ``part<i>.<tensor>`` for every tensor of part i (the base is part 0), and ``places``
    int32 [K]: column c of the weight is column ``places[c]`` of all parts side by side.

    Attributes:
        base: What all columns are stored as that no part has.
        parts: The others, at least one.

    Raises:
        RecipeError: Parts cannot stand beside each other.
    """

    base: Format
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise RecipeError("a split format has a part beside its base")
        for format in self.formats:
            if not isinstance(format, _FAMILIES):
                raise RecipeError(
                    f"format {format} cannot have some columns of a weight",
                    remedy="use integers, tables or 16-bit floats for its parts",
                )

    @property
    def name(self) -> str:
        """Such as ``int3-g64-asym+1%fp16`` or ``int2-g64+2xint1-g64+2xint3-g64``."""
        return "+".join([str(self.base), *map(str, self.parts)])

    @property
    def formats(self) -> tuple[Format, ...]:
        """That of the base, then those of the parts."""
        return (self.base, *(part.format for part in self.parts))

    @property
    def group_size(self) -> int:
        """That of the base."""
        return self.base.group_size

    @property
    def block_size(self) -> int:
        """Columns that stay together."""
        return gcd(*(format.group_size or 1 for format in self.formats))

    def widths(self, columns: int) -> tuple[int, ...]:
        """How many columns of a weight each format has.

        Args:
            columns: K.

        Raises:
            RecipeError: None would be left for the base.
        """
        size = self.block_size
        available = columns // size
        taken = [part.blocks(available) * size for part in self.parts]
        if sum(taken) >= columns:
            raise RecipeError(
                f"format {self} leaves no column of {columns} for {self.base}",
                remedy="choose smaller parts, or leave such layers to another format",
            )
        return (columns - sum(taken), *taken)

    def divide(self, scores: Tensor) -> tuple[Tensor, ...]:
        """The columns of each format: those of the highest scores to the one of the most bits.

        Args:
            scores: How much each column matters, [K].

        Returns:
            For each of `formats` its columns in rising order, int64.
        """
        size, columns = self.block_size, len(scores)
        widths = self.widths(columns)
        whole = columns // size
        by_block = scores[: whole * size].reshape(whole, size).sum(-1)
        ranked = torch.argsort(by_block, descending=True, stable=True)
        order = sorted(range(len(widths)), key=lambda i: -self._bits(i))
        found: list[Tensor] = [torch.empty(0)] * len(widths)
        start = 0
        for index in order:
            blocks = ranked[start : start + widths[index] // size].sort().values
            found[index] = (blocks[:, None] * size + torch.arange(size)).flatten()
            start += len(blocks)
        found[0] = torch.cat([found[0], torch.arange(whole * size, columns)])
        return tuple(found)

    def join(
        self, parts: Sequence[QuantizedWeight], columns: Sequence[Tensor], shape: tuple[int, ...]
    ) -> QuantizedWeight:
        """The weight of which these are the parts.

        Args:
            parts: One for each of `formats`.
            columns: Which columns of the weight they are, in any order.
            shape: Of the weight.
        """
        tensors = {
            _tensor(index, name): tensor
            for index, part in enumerate(parts)
            for name, tensor in part.tensors.items()
        }
        places = torch.argsort(torch.cat(list(columns))).to(torch.int32)
        return QuantizedWeight(self, shape, {**tensors, PLACES: places})

    def encode(
        self, weight: Tensor, *, scale_search: ScaleSearch = "absmax", name: str = "weight"
    ) -> QuantizedWeight:
        """Rounds to nearest; the columns of the largest weights go to the formats of most bits.

        Raises:
            ModelError: The weight is not finite, or a format cannot reach its values.
        """
        require_finite(weight, name)
        rows = weight.reshape(-1, weight.shape[-1])
        columns = self.divide(rows.square().sum(0, dtype=torch.float64))
        parts = [
            format.encode(weight[..., chosen], scale_search=scale_search, name=name)
            for format, chosen in zip(self.formats, columns, strict=True)
        ]
        return self.join(parts, columns, tuple(weight.shape))

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K]."""
        decoded = [part.format.decode(part) for part in self.take_apart(quantized)]
        return torch.cat(decoded, dim=-1)[..., quantized.tensors[PLACES].long()]

    def take_apart(self, quantized: QuantizedWeight) -> tuple[QuantizedWeight, ...]:
        """The parts of a weight: `join` read backwards."""
        found = []
        for index, (format, shape) in enumerate(self._shapes(quantized.shape)):
            names = {name: _tensor(index, name) for name in format.tensors(shape)}
            tensors = {name: quantized.tensors[stored] for name, stored in names.items()}
            found.append(QuantizedWeight(format, shape, tensors))
        return tuple(found)

    def rows(self, quantized: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
        """The part of a quantized weight that stands for a range of its first axis."""
        parts = [part.format.rows(part, start, stop) for part in self.take_apart(quantized)]
        tensors = {
            _tensor(index, name): tensor
            for index, part in enumerate(parts)
            for name, tensor in part.tensors.items()
        }
        tensors[PLACES] = quantized.tensors[PLACES]
        return QuantizedWeight(self, (stop - start, *quantized.shape[1:]), tensors)

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Those of the parts, and ``places``.

        Raises:
            RecipeError: No column would be left for the base.
        """
        specs = {
            _tensor(index, name): spec
            for index, (format, part) in enumerate(self._shapes(shape))
            for name, spec in format.tensors(part).items()
        }
        return {**specs, PLACES: TensorSpec(shape[-1:], torch.int32)}

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """The bits of all parts together by their kind, and an index for each column."""
        bits: dict[str, int] = {}
        for format, part in self._shapes(shape):
            for name, count in format.bits_by_part(part).items():
                bits[name] = bits.get(name, 0) + count
        index = TensorSpec(shape[-1:], index_dtype(shape[-1]))
        return {**bits, PLACES: index.bytes * 8}

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """The parts side by side, and their columns put in place by one `index_select`."""
        values = []
        for index, format in enumerate(self.formats):
            prefix = _tensor(index, "")
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            values.append(format.emit(editor, own))
        joined = editor.call(_aten.cat.default, values, -1)
        return editor.call(_aten.index_select.default, joined, -1, tensors[PLACES])

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that an `index_select` of joined stored weights puts together."""
        found = side_by_side(node)
        if found is None:
            return None
        operands, places = found
        parts = [_recognize(operand) for operand in operands]
        known = tuple(part for part in parts if part is not None)
        if len(known) < max(len(parts), 2):
            return None
        formats = [part.format for part in known]
        size = gcd(*(format.group_size or 1 for format in formats))
        amounts = [part.shape[-1] // size for part in known]
        others = zip(formats[1:], amounts[1:], strict=True)
        format = cls(formats[0], tuple(Part(*other) for other in others))
        tensors = {
            _tensor(index, name): tensor
            for index, part in enumerate(known)
            for name, tensor in part.tensors.items()
        }
        return StoredWeight(format, {**tensors, PLACES: places}, node, known)

    def _shapes(self, shape: tuple[int, ...]) -> Iterator[tuple[Format, tuple[int, ...]]]:
        for format, width in zip(self.formats, self.widths(shape[-1]), strict=True):
            yield format, (*shape[:-1], width)

    def _bits(self, index: int) -> float:
        """Bits of a code of a format."""
        size = 240  # whole bytes of codes for every width
        return self.formats[index].bits_by_part((1, size))["codes"] / size


def index_dtype(columns: int) -> torch.dtype:
    """The type that columns of a weight are stored in: 16 bits where these do."""
    return torch.int16 if columns <= _MOST_SHORT else torch.int32


def side_by_side(node: object) -> tuple[list[fx.Node], fx.Node] | None:
    """The parts of a value ``index_select(cat(parts, -1), -1, places)``, and the stored places.

    Args:
        node: A weight or an input of a linear layer.

    Returns:
        None if it is anything else.
    """
    if not isinstance(node, fx.Node) or node.target != _aten.index_select.default:
        return None
    joined, axis, places = node.args
    if axis != -1 or not isinstance(places, fx.Node) or places.op != "get_attr":
        return None
    if not isinstance(joined, fx.Node) or joined.target != _aten.cat.default:
        return None
    operands, *dim = joined.args
    if dim != [-1] or not isinstance(operands, Sequence):
        return None
    return [operand for operand in operands if isinstance(operand, fx.Node)], places


def _recognize(node: fx.Node) -> StoredWeight | None:
    found = (family.recognize(node) for family in _FAMILIES)
    return next((weight for weight in found if weight is not None), None)


def _tensor(index: int, name: str) -> str:
    return f"part{index}.{name}"
