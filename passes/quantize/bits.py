"""Every stored bit of a program, counted."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from qcompile.formats import StoredWeight, stored_weight
from qcompile.ir.program import Program


@dataclass(frozen=True)
class StoredTensor:
    """What one weight takes.

    Attributes:
        name: The weight, by its name in the checkpoint.
        format: The name of its format, or of its dtype (such as ``"float32"``).
        shape: Of the weight.
        code_bits: Bits of the codes, or of the numbers where it is not quantized.
        scale_bits: Bits of scales, and of tables beside them.
        zero_point_bits: Bits of zero points.
        quantized: Whether codes stand for it.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    code_bits: int
    scale_bits: int = 0
    zero_point_bits: int = 0
    quantized: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """All bits."""
        return self.code_bits + self.scale_bits + self.zero_point_bits

    @property
    def bits_per_weight(self) -> float:
        """`bits` divided by `weights`; 0 for an empty tensor."""
        return _ratio(self.bits, self.weights)


@dataclass(frozen=True)
class BitsReport:
    """What a program's weights take, before a target packs (and perhaps pads) them.

    Attributes:
        tensors: Every stored weight once, in graph order.
    """

    tensors: tuple[StoredTensor, ...]

    @property
    def advertised(self) -> float:
        """Mean width of the codes of quantized weights: the figure that papers print."""
        return self._mean([t for t in self.tensors if t.quantized], codes_only=True)

    @property
    def quantized(self) -> float:
        """Bits stored per quantized weight, with scales and zero points."""
        return self._mean([t for t in self.tensors if t.quantized])

    @property
    def overall(self) -> float:
        """Bits stored per weight over all weights, those that stay float included."""
        return self._mean(list(self.tensors))

    @property
    def bytes(self) -> int:
        """All bits together, in whole bytes."""
        return -(-sum(t.bits for t in self.tensors) // 8)

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, and one entry per tensor, for manifest and report."""
        return {
            "advertised_bits_per_weight": self.advertised,
            "stored_bits_per_quantized_weight": self.quantized,
            "stored_bits_per_weight": self.overall,
            "quantized_weights": sum(t.weights for t in self.tensors if t.quantized),
            "weights": sum(t.weights for t in self.tensors),
            "bytes": self.bytes,
            "tensors": [
                {**asdict(t), "shape": list(t.shape), "bits_per_weight": t.bits_per_weight}
                for t in self.tensors
            ],
        }

    @staticmethod
    def _mean(tensors: list[StoredTensor], *, codes_only: bool = False) -> float:
        bits = sum(t.code_bits if codes_only else t.bits for t in tensors)
        return _ratio(bits, sum(t.weights for t in tensors))


def count_bits(program: Program) -> BitsReport:
    """Counts the bits of every weight that a program names, each once however often it is used.

    Codes and zero points count at the width of their format, scales and float weights at that of
    their dtype. Call it before lowering, which changes how weights are stored.
    """
    tensors: dict[str, StoredTensor] = {}
    parts: set[str] = set()
    for node in program.graph.nodes:
        if (weight := stored_weight(node)) is not None:
            tensors[weight.name] = _quantized(weight)
            parts.update(str(tensor.target) for tensor in weight.tensors.values())
            parts.update(part.name for part in weight.parts)
        elif node.op == "get_attr":
            spec = program.weights.spec(str(node.target))
            tensors[str(node.target)] = StoredTensor(
                str(node.target),
                str(spec.dtype).removeprefix("torch."),
                spec.shape,
                spec.bytes * 8,
            )
    return BitsReport(tuple(t for name, t in tensors.items() if name not in parts))


def _quantized(weight: StoredWeight) -> StoredTensor:
    bits = weight.format.bits_by_part(weight.shape)
    codes, zero_points = bits.pop("codes"), bits.pop("zero_point", 0)
    return StoredTensor(
        name=weight.name,
        format=str(weight.format),
        shape=weight.shape,
        code_bits=codes,
        scale_bits=sum(bits.values()),
        zero_point_bits=zero_points,
        quantized=True,
    )


def _ratio(bits: int, weights: int) -> float:
    return bits / weights if weights else 0.0
