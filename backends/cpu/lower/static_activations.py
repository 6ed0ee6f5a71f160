"""Activations of one static scale: what the integer kernels are given in their place.

Codes with a zero point are unsigned, and the kernels multiply signed bytes: codes are moved by 128,
and what the products then lack is the same for every token. It goes into the bias::

    (q - z) s . w  =  (q - 128) s . w  -  (z - 128) s . sum(w)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.cpu import ops
from qcompile.formats import QuantizedWeight, StoredWeight
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.passes.lower.rounded_inputs import RoundedInput


@dataclass(frozen=True)
class StaticInput:
    """The operands of a layer over static codes.

    Attributes:
        act: ``"int8_static"`` or ``"uint8_static"``.
        grid: Scale and zero point, ``[2]`` float32.
        bias: The layer's, with the zero point's part; or None.
    """

    act: str
    grid: fx.Node
    bias: fx.Node | None


def static_input(
    editor: Editor, linear: fx.Node, rounded: RoundedInput, weight: StoredWeight
) -> StaticInput | None:
    """How the kernels multiply codes of one stored scale.

    Args:
        editor: Stands before the linear.
        linear: The layer.
        rounded: Its input, rounded.
        weight: Its weight.

    Returns:
        None if the scale is not one stored number, or the bias is computed.
    """
    bias = linear.args[2] if len(linear.args) > 2 else None
    assert bias is None or isinstance(bias, fx.Node)
    if not rounded.is_static_byte or (bias is not None and bias.op != "get_attr"):
        return None
    grid = _grid(editor, rounded)
    if rounded.zero_point is None:
        return StaticInput(ops.INT8_STATIC, grid, bias)
    folded = _folded_bias(editor, linear, rounded, rounded.zero_point, weight, bias)
    return StaticInput(ops.UINT8_STATIC, grid, folded)


def _grid(editor: Editor, rounded: RoundedInput) -> fx.Node:
    weights, scale = editor.program.weights, str(rounded.scale.target)
    name = f"{scale.removesuffix('scale')}grid"
    if name not in weights:
        zero = rounded.zero_point
        operands = (scale,) if zero is None else (scale, str(zero.target))
        spec = TensorSpec((2,), torch.float32)
        weights.derive(name, operands, _join_grid, spec, exact=True, label="grid")
    return editor.weight(name)


def _join_grid(scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.to(scale.dtype)
    return torch.cat((scale, zero))


def _folded_bias(
    editor: Editor,
    linear: fx.Node,
    rounded: RoundedInput,
    zero_point: fx.Node,
    weight: StoredWeight,
    bias: fx.Node | None,
) -> fx.Node:
    parts, shape, format = tuple(weight.tensors), weight.shape, weight.format

    def fold(scale: Tensor, zero: Tensor, *rest: Tensor) -> Tensor:
        decoded = format.decode(
            QuantizedWeight(format, shape, dict(zip(parts, rest, strict=False)))
        )
        lacking = (zero.to(torch.float64) - ops.MIDDLE_CODE) * scale
        folded = -lacking * decoded.to(torch.float64).sum(1)
        return folded if bias is None else folded + rest[-1]

    stored: Sequence[Any] = (rounded.scale, zero_point, *weight.tensors.values())
    operands = tuple(str(node.target) for node in (*stored, *([] if bias is None else [bias])))
    name = f"{weight.name}.{linear.name}.folded_bias"
    spec = TensorSpec((shape[0],), torch.float32)
    editor.program.weights.derive(name, operands, fold, spec, exact=False, label="fold zero point")
    return editor.weight(name)
