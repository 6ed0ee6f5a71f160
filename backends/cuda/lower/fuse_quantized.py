"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.backends.cuda import ops
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.quantized_linear.layout import pack_codes, packed_shape
from qcompile.passes.infra import Context, Equivalent, Numerics, Pass, PassResult
from qcompile.passes.quantize.layers import EMBEDDING, LINEAR, dequantized_weight


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
            weight = dequantized_weight(operand)
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


def _pack(editor: Editor, weight: fx.Node) -> _Packed:
    codes, scale, zero_point, bits, group_size = weight.args
    assert isinstance(codes, fx.Node)
    assert isinstance(bits, int)
    assert isinstance(group_size, int)
    n, k = (int(size) for size in codes.meta["val"].shape)
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
    return _Packed(tensors, (k, bits, group_size))


def _transposed(editor: Editor, node: object) -> fx.Node:
    """A stored ``[N, G]`` as ``[G, N]``."""
    assert isinstance(node, fx.Node)
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
