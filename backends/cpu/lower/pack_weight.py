"""Stored codes as the kernels read them: packed once, lazily, however many nodes use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from qcompile.backends.cpu.packable import layout_of, unpackable_reason
from qcompile.errors import TargetError
from qcompile.formats import LookupFormat, StoredWeight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.cpu.layout import WeightLayout, pack_linear, packed_size


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight: the node that names it, its shape, and how it is stored.

    Attributes:
        node: ``[bytes]`` uint8; of a stack of matrices, one behind the other.
        shape: ``(N, K)``, or ``(E, N, K)``.
        layout: How each matrix is stored.
    """

    node: fx.Node
    shape: tuple[int, ...]
    layout: WeightLayout

    @property
    def arguments(self) -> tuple[int, int, str]:
        """n, k and layout, as the operators take them."""
        n, k = self.shape[-2:]
        return n, k, str(self.layout)


def pack_weight(editor: Editor, weight: StoredWeight) -> PackedWeight:
    """Refers to a weight in packed form where the editor stands.

    Raises:
        TargetError: The kernels cannot read its format.
    """
    reason = unpackable_reason(weight.format)
    if reason is not None:
        raise TargetError(
            f"weight '{weight.name}': {reason}",
            remedy="choose another format for it in the recipe, such as int4-g32 or int8",
        )
    layout = layout_of(weight.format)
    name = f"{weight.name}.codes.packed"
    if name not in editor.program.weights:
        _define_packed(editor.program, name, weight, layout)
    return PackedWeight(editor.weight(name), weight.shape, layout)


def _define_packed(program: Program, name: str, weight: StoredWeight, layout: WeightLayout) -> None:
    parts = tuple(weight.tensors)
    *stack, n, k = weight.shape
    levels = None
    if layout.coding == "table":
        assert isinstance(weight.format, LookupFormat)
        levels = np.array(weight.format.levels, np.float32)

    def pack_matrix(tensors: dict[str, npt.NDArray[Any]]) -> Tensor:
        outer = tensors.get("outer_scale")
        return torch.from_numpy(
            pack_linear(
                tensors["codes"],
                tensors["scale"],
                tensors.get("zero_point"),
                bits=layout.bits,
                group_size=layout.group_size,
                scale_dtype=layout.scale_dtype,
                coding=layout.coding,
                levels=levels,
                outer_scale=None if outer is None else outer.reshape(-1),
            )
        )

    def pack(*values: Tensor) -> Tensor:
        tensors = dict(zip(parts, map(_to_numpy, values), strict=True))
        if not stack:
            return pack_matrix(tensors)
        matrices = [
            pack_matrix({part: tensor[i] for part, tensor in tensors.items()})
            for i in range(stack[0])
        ]
        return torch.cat(matrices)

    operands = tuple(str(tensor.target) for tensor in weight.tensors.values())
    spec = TensorSpec((packed_size(n, k, layout) * (stack[0] if stack else 1),), torch.uint8)
    program.weights.derive(name, operands, pack, spec, exact=True, label="pack")


def _to_numpy(value: Tensor) -> npt.NDArray[Any]:
    """As numpy has it: bfloat16 becomes float32."""
    return (value.float() if value.is_floating_point() else value).numpy()
