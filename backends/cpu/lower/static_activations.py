"""Activations of one static scale: what the integer kernels are given in their place.

Codes with a zero point are unsigned, and the kernels multiply signed bytes: codes are moved by half
of their range, m, and what the products then lack is the same for every token. It goes into the
bias::

    (q - z) s . w  =  (q - m) s . w  -  (z - m) s . sum(w)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.cpu.activations import IntegerActivations
from qcompile.formats import QuantizedWeight, StoredWeight
from qcompile.ir.edit import Editor
from qcompile.ir.weights import TensorSpec
from qcompile.passes.lower.rounded_inputs import RoundedInput


@dataclass(frozen=True)
class StaticInput:
    """The operands of a layer over static codes.

    Attributes:
        act: How they are rounded, as a node says it.
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
    if not rounded.has_one_stored_scale or (bias is not None and bias.op != "get_attr"):
        return None
    act = IntegerActivations(rounded.bits, "static", signed=rounded.zero_point is None)
    if rounded.zero_point is not None:
        bias = _folded_bias(editor, linear, rounded, act.middle, weight, bias)
    return StaticInput(str(act), _grid(editor, rounded), bias)


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
    middle: int,
    weight: StoredWeight,
    bias: fx.Node | None,
) -> fx.Node:
    parts, shape, format = tuple(weight.tensors), weight.shape, weight.format

    def fold(scale: Tensor, zero: Tensor, *rest: Tensor) -> Tensor:
        decoded = format.decode(
            QuantizedWeight(format, shape, dict(zip(parts, rest, strict=False)))
        )
        lacking = (zero.to(torch.float64) - middle) * scale
        folded = -lacking * decoded.to(torch.float64).sum(1)
        return folded if bias is None else folded + rest[-1]

    stored: Sequence[Any] = (rounded.scale, rounded.zero_point, *weight.tensors.values())
    operands = tuple(str(node.target) for node in (*stored, *([] if bias is None else [bias])))
    name = f"{weight.name}.{linear.name}.folded_bias"
    spec = TensorSpec((shape[0],), torch.float32)
    editor.program.weights.derive(name, operands, fold, spec, exact=False, label="fold zero point")
    return editor.weight(name)
