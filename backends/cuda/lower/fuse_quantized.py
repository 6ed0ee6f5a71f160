"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.backends.cuda import ops
from qcompile.errors import TargetError
from qcompile.formats import IntegerFormat, StoredWeight, stored_weight
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.quantized_linear.layout import pack_codes, packed_shape
from qcompile.passes.infra import Context, Equivalent, Numerics, Pass, PassResult
from qcompile.passes.quantize.layers import EMBEDDING, LINEAR


class FuseQuantized(Pass):
    """Matches the kernels over packed codes.

    1. ``linear(x, dequantize(codes, scale, zero), b)``  =>  ``quantized_linear(x, packed, ..., b)``
    2. ``embedding(dequantize(codes, scale, zero), ids)``  =>  ``quantized_embedding(ids, ...)``

    A weight is packed once, lazily, however many nodes use it. Nothing is rounded yet.
    """

    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.CANONICAL})
    numerics: ClassVar[Numerics] = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every layer whose weight is stored as codes."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(LINEAR, EMBEDDING):
            operand = node.args[1] if node.target is LINEAR else node.args[0]
            weight = stored_weight(operand)
            if weight is None:
                continue
            with editor.before(node):
                packed = _pack(editor, weight)
                if node.target is LINEAR:
                    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
                    new = editor.call(
                        ops.linear, node.args[0], *packed.tensors, bias, *packed.numbers, "none"
                    )
                else:
                    # What follows the ids in ATen's operator matters to gradients only.
                    new = editor.call(ops.embedding, node.args[1], *packed.tensors, *packed.numbers)
            editor.replace(node, new)
            result.rewrites += 1
        return result


@dataclass(frozen=True)
class _Packed:
    """A packed weight as the operators take it.

    Attributes:
        tensors: Packed codes, scale, and zero point or None.
        numbers: k, bits and group size.
    """

    tensors: tuple[fx.Node, fx.Node, fx.Node | None]
    numbers: tuple[int, int, int]


def _pack(editor: Editor, weight: StoredWeight) -> _Packed:
    format = weight.format
    if not isinstance(format, IntegerFormat):
        raise TargetError(
            f"weight '{weight.name}': the cuda kernels have no {format}",
            remedy="choose an integer format for it in the recipe, such as int4-g32",
        )
    codes, scale = weight.tensors["codes"], weight.tensors["scale"]
    zero_point = weight.tensors.get("zero_point")
    bits, (n, k) = format.bits, weight.shape
    name = str(codes.target)
    packed = f"{name}.packed"
    if packed not in editor.program.weights:

        def pack(codes: Tensor) -> Tensor:
            return pack_codes(codes, bits)

        spec = TensorSpec(packed_shape(n, k, bits), torch.uint8)
        editor.program.weights.derive(packed, (name,), pack, spec, exact=True, label="pack")
    tensors = (
        editor.weight(packed),
        _transposed(editor, scale),
        None if zero_point is None else _transposed(editor, zero_point),
    )
    return _Packed(tensors, (k, bits, format.group_size))


def _transposed(editor: Editor, node: fx.Node) -> fx.Node:
    """A stored ``[N, G]`` as ``[G, N]``."""
    name = str(node.target)
    transposed = f"{name}.transposed"
    weights = editor.program.weights
    if transposed not in weights:
        spec = weights.spec(name)
        weights.derive(
            transposed,
            (name,),
            lambda value: value.t().contiguous(),
            TensorSpec(spec.shape[::-1], spec.dtype),
            exact=True,
            label="transpose",
        )
    return editor.weight(transposed)
