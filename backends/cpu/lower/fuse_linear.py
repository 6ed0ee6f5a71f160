"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.packable import scale_dtype_index, unpackable_reason
from qcompile.errors import TargetError
from qcompile.formats import IntegerFormat, StoredWeight, stored_weight
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.weights import TensorSpec
from qcompile.kernels.cpu.layout import SCALE_DTYPES, ScaleDtype, pack_linear, packed_size
from qcompile.passes.infra import Context, Equivalent, Pass, PassResult

aten = torch.ops.aten


class FuseLinear(Pass):
    """Matches the library's matrix kernels.

    1. ``linear(x, dequantize(W), b)``           =>  ``cpu_linear(x, packed W, b, act="float")``
    2. the same with `x` rounded by ``dequantize(quantize(x))``, one scale per token or per group
       of the weight                             =>  ``act="int8_token"`` or ``"int8_group"``
    3. ``embedding(dequantize(W), ids)``         =>  ``cpu_embedding(ids, packed W)``

    A weight is packed once, lazily, however many nodes use it.
    """

    requires = frozenset({Fact.CANONICAL})
    numerics = Equivalent()

    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrites every quantized layer."""
        del context
        result = PassResult()
        editor = Editor(program)
        for node in program.calls(aten.linear.default, aten.embedding.default):
            weight = stored_weight(node.args[1 if node.target is aten.linear.default else 0])
            if weight is None:
                continue
            with editor.before(node):
                packed, layout = _packed(editor, weight)
                if node.target is aten.linear.default:
                    new = _linear(editor, node, packed, layout)
                else:
                    new = editor.call(ops.embedding, node.args[1], packed, *layout)
            editor.replace(node, new)
            result.rewrites += 1
        return result


Layout = tuple[int, int, int, int, bool, int]
"""n, k, bits, group_size, has_zero_point, scale_dtype: as the operators take them."""


def _packed(editor: Editor, weight: StoredWeight) -> tuple[fx.Node, Layout]:
    format, (n, k) = weight.format, weight.shape
    reason = unpackable_reason(format)
    if reason is not None:
        raise TargetError(
            f"weight '{weight.name}': {reason}",
            remedy="choose another format for it in the recipe, such as int4-g32 or int8",
        )
    assert isinstance(format, IntegerFormat)
    scale_dtype = scale_dtype_index(format.scale_dtype)
    layout = (n, k, format.bits, format.group_size, not format.symmetric, scale_dtype)
    packed_name = f"{weight.name}.codes.packed"
    if packed_name not in editor.program.weights:
        operands = tuple(str(tensor.target) for tensor in weight.tensors.values())
        _define_packed(editor.program, packed_name, operands, layout)
    return editor.weight(packed_name), layout


def _define_packed(
    program: Program, packed_name: str, operands: tuple[str, ...], layout: Layout
) -> None:
    n, k, bits, group_size, has_zero_point, scale_dtype = layout
    kind: ScaleDtype = SCALE_DTYPES[scale_dtype]

    def pack(codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return torch.from_numpy(
            pack_linear(
                codes.numpy(),
                scale.float().numpy(),
                None if zero_point is None else zero_point.numpy(),
                bits=bits,
                group_size=group_size,
                scale_dtype=kind,
            )
        )

    size = packed_size(
        n, k, bits=bits, group_size=group_size, has_zero_point=has_zero_point, scale_dtype=kind
    )
    spec = TensorSpec((size,), torch.uint8)
    program.weights.derive(packed_name, operands, pack, spec, exact=True, label="pack")


def _linear(editor: Editor, node: fx.Node, packed: fx.Node, layout: Layout) -> fx.Node:
    x, act = _activations(node.args[0], group_size=layout[3])
    bias = node.args[2] if len(node.args) > 2 else None
    return editor.call(ops.linear, x, packed, bias, None, *layout, act)


def _activations(x: Any, group_size: int) -> tuple[Any, str]:
    """The float input of a linear, and how it is rounded on the way."""
    source, group = _dynamic_int8(x)
    if source is None or group not in (0, group_size):
        return x, ops.FLOAT_ACTIVATIONS
    return source, ops.INT8_PER_GROUP if group else ops.INT8_PER_TOKEN


def _dynamic_int8(x: Any) -> tuple[fx.Node | None, int]:
    """What a node rounds to symmetric int8 with scales of its own, and the group of these scales.

    None unless all three operators agree: the scale, too, is that of this input, width and group.
    """
    if not isinstance(x, fx.Node) or x.target is not dialect.dequantize:
        return None, 0
    codes, scale, *how = x.args
    zero_point, bits, group = how
    if not isinstance(codes, fx.Node) or codes.target is not dialect.quantize:
        return None, 0
    if not isinstance(scale, fx.Node) or scale.target is not dialect.dynamic_scale:
        return None, 0
    source = codes.args[0]
    agree = codes.args[1:] == (scale, *how) and scale.args == (source, bits, group)
    if not agree or zero_point is not None or bits != _INT8_BITS:
        return None, 0
    assert isinstance(source, fx.Node)
    assert isinstance(group, int)
    return source, group


_INT8_BITS = 8
