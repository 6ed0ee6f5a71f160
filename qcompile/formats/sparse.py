"""A weight in few bits, and beside it what a few numbers of each row are more than that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.errors import ModelError, RecipeError
from qcompile.formats.base import Format, QuantizedWeight, StoredWeight
from qcompile.formats.grid import ScaleSearch, require_finite
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.lookup import LookupFormat
from qcompile.formats.split import Percent, SplitFormat, index_dtype, spell_amount
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.add_sparse.reference import add_sparse

_BASE = "base."
_FAMILIES: tuple[type[Format], ...] = (IntegerFormat, LookupFormat, SplitFormat)


@dataclass(frozen=True)
class SparseFormat(Format):
    """weight = base + a float16 at a few places of each row.

    Every row has as many, so that no row pointers are stored; where they are is data of the weight.
    What stands there is what the base lacks: where its code is that of 0, the weight itself.

    Tensors: ``base.<tensor>`` for every tensor of the base, ``index`` [..., M] int16 (int32 past
    32,768 columns), rising, and ``values`` [..., M] float16.

    Attributes:
        base: What is stored of all weights.
        amount: How many numbers of a row have a float beside them, or the share of them.

    Raises:
        RecipeError: The base is no integers or tables, split or not.
    """

    base: Format
    amount: int | Percent

    def __post_init__(self) -> None:
        if not isinstance(self.base, _FAMILIES):
            raise RecipeError(
                f"format {self.base} cannot have floats beside it",
                remedy="use integers or tables, split or not",
            )

    @property
    def name(self) -> str:
        """Such as ``int3-g64-asym/1%fp16`` or ``int4-g128/6xfp16``."""
        return f"{self.base}/{spell_amount(self.amount)}fp16"

    @property
    def group_size(self) -> int:
        """That of the base."""
        return self.base.group_size

    def count(self, columns: int) -> int:
        """How many floats a row of `columns` numbers has beside it.

        Raises:
            RecipeError: There would be more than numbers.
        """
        count = self.amount if isinstance(self.amount, int) else self.amount.of(columns)
        if count > columns:
            raise RecipeError(
                f"format {self} has more floats beside a row than its {columns} numbers",
                remedy="give a share of the row, such as 1%fp16",
            )
        return count

    def largest(self, scores: Tensor) -> Tensor:
        """The places of the highest scores of each row, rising, int64 [..., M].

        Args:
            scores: [..., K].
        """
        chosen = torch.topk(scores, self.count(scores.shape[-1]), dim=-1).indices
        return chosen.sort(dim=-1).values

    def join(
        self, base: QuantizedWeight, index: Tensor, values: Tensor, name: str
    ) -> QuantizedWeight:
        """The weight of a base and what is added to it.

        Args:
            base: Of the format of that name.
            index: [..., M].
            values: [..., M] floating; rounded to float16.
            name: What error messages call the weight.

        Raises:
            ModelError: A value is too large for float16.
        """
        rounded = values.to(torch.float16)
        if not bool(rounded.isfinite().all()):
            raise ModelError(
                f"'{name}' has values too large for fp16",
                remedy="choose a format without floats beside its codes for it, or leave it float",
            )
        tensors = {_BASE + name: tensor for name, tensor in base.tensors.items()}
        tensors["index"] = index.to(index_dtype(base.shape[-1]))
        return QuantizedWeight(self, base.shape, {**tensors, "values": rounded})

    def encode(
        self, weight: Tensor, *, scale_search: ScaleSearch = "absmax", name: str = "weight"
    ) -> QuantizedWeight:
        """Floats for the largest weights of each row; the base rounds the others to nearest.

        Raises:
            ModelError: The weight is not finite, or out of reach.
        """
        require_finite(weight, name)
        values = weight.to(torch.float32)
        index = self.largest(values.abs())
        base = self.base.encode(
            values.scatter(-1, index, 0.0), scale_search=scale_search, name=name
        )
        lacking = values - self.base.decode(base)
        return self.join(base, index, lacking.gather(-1, index), name)

    def decode(self, quantized: QuantizedWeight) -> Tensor:
        """The stored values, float32 [..., K]."""
        base = self.base.decode(self.base_of(quantized))
        return add_sparse(base, quantized.tensors["index"], quantized.tensors["values"])

    def base_of(self, quantized: QuantizedWeight) -> QuantizedWeight:
        """The base of a weight."""
        tensors = {
            name.removeprefix(_BASE): tensor
            for name, tensor in quantized.tensors.items()
            if name.startswith(_BASE)
        }
        return QuantizedWeight(self.base, quantized.shape, tensors)

    def rows(self, quantized: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
        """The part of a quantized weight that stands for a range of its first axis."""
        base = self.base.rows(self.base_of(quantized), start, stop)
        tensors = {_BASE + name: tensor for name, tensor in base.tensors.items()}
        side = {name: quantized.tensors[name][start:stop] for name in ("index", "values")}
        return QuantizedWeight(self, base.shape, {**tensors, **side})

    def tensors(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """Those of the base, and of what is beside it."""
        specs = {_BASE + name: spec for name, spec in self.base.tensors(shape).items()}
        side = (*shape[:-1], self.count(shape[-1]))
        specs["index"] = TensorSpec(side, index_dtype(shape[-1]))
        return {**specs, "values": TensorSpec(side, torch.float16)}

    def bits_by_part(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Those of the base; its codes and the floats count as codes."""
        specs = self.tensors(shape)
        bits = self.base.bits_by_part(shape)
        return {
            **bits,
            "codes": bits["codes"] + specs["values"].bytes * 8,
            "index": specs["index"].bytes * 8,
        }

    def emit(self, editor: Editor, tensors: Mapping[str, fx.Node]) -> fx.Node:
        """The base's nodes, and one `qc.add_sparse`."""
        own = {n.removeprefix(_BASE): t for n, t in tensors.items() if n.startswith(_BASE)}
        base = self.base.emit(editor, own)
        return editor.call(dialect.add_sparse, base, tensors["index"], tensors["values"])

    @classmethod
    def recognize(cls, node: fx.Node) -> StoredWeight | None:
        """The weight that a `qc.add_sparse` of a stored weight and stored numbers gives."""
        if node.target != dialect.add_sparse:
            return None
        value, index, values = node.args
        assert isinstance(value, fx.Node)
        assert isinstance(index, fx.Node)
        assert isinstance(values, fx.Node)
        found = (family.recognize(value) for family in _FAMILIES)
        base = next((weight for weight in found if weight is not None), None)
        if base is None or index.op != "get_attr" or values.op != "get_attr":
            return None
        count = int(index.meta["val"].shape[-1])
        tensors = {_BASE + name: tensor for name, tensor in base.tensors.items()}
        tensors.update(index=index, values=values)
        return StoredWeight(cls(base.format, count), tensors, node, (base, *base.parts))
