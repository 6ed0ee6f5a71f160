"""Quantized linears and embeddings become one node each, over packed weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.packable import scale_dtype_index, unpackable_reason
from qcompile.errors import TargetError
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
            weight = node.args[1] if node.target is aten.linear.default else node.args[0]
            if not isinstance(weight, fx.Node) or not is_stored_weight(weight):
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


def is_stored_weight(node: fx.Node) -> bool:
    """Whether a node decodes stored integer codes."""
    return (
        node.target is dialect.dequantize
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op == "get_attr"
    )


Layout = tuple[int, int, int, int, bool, int]
"""n, k, bits, group_size, has_zero_point, scale_dtype: as the operators take them."""


def _packed(editor: Editor, weight: fx.Node) -> tuple[fx.Node, Layout]:
    codes, scale, zero_point, bits, group_size = weight.args
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert isinstance(bits, int)
    assert isinstance(group_size, int)
    name = str(codes.target)
    _refuse_unpackable(name, bits, group_size, scale.meta["val"].dtype)
    n, k = codes.meta["val"].shape
    has_zero_point = isinstance(zero_point, fx.Node)
    scale_dtype = scale_dtype_index(scale.meta["val"].dtype)
    layout = (n, k, bits, group_size, has_zero_point, scale_dtype)
    packed_name = f"{name}.packed"
    if packed_name not in editor.program.weights:
        operands = [str(n.target) for n in (codes, scale, zero_point) if isinstance(n, fx.Node)]
        _define_packed(editor.program, packed_name, tuple(operands), layout)
    return editor.weight(packed_name), layout


def _refuse_unpackable(name: str, bits: int, group_size: int, scale_dtype: torch.dtype) -> None:
    reason = unpackable_reason(bits, group_size, scale_dtype)
    if reason is not None:
        raise TargetError(
            f"weight '{name.removesuffix('.codes')}': {reason}",
            remedy="choose another format for it in the recipe, such as int4-g32 or int8",
        )


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
