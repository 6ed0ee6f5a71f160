"""One linear as the sum of two: over its first input channels, and over the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec

aten = torch.ops.aten

LOW, HIGH = "low", "high"
"""What the parts of a weight are called, before the ``.weight`` of its name."""


def split_channels(program: Program, linears: Sequence[fx.Node], low: int) -> None:
    """Splits the input channels of linears, so that the parts may be quantized differently.

    ``linear(x, W, b)``  =>  ``linear(x[:low], W[:, :low]) + linear(x[low:], W[:, low:], b)``

    The parts of ``q.weight`` are called ``q.low.weight`` and ``q.high.weight``.

    Args:
        program: Edited in place.
        linears: Calls over stored weights that all read the same x.
        low: Channels of the first part.
    """
    editor = Editor(program)
    x = linears[0].args[0]
    assert isinstance(x, fx.Node)
    width = int(x.meta["val"].shape[-1])
    axis = x.meta["val"].dim() - 1
    with editor.before(linears[0]):
        first = editor.call(aten.slice.Tensor, x, axis, 0, low)
        rest = editor.call(aten.slice.Tensor, x, axis, low, width)
    for linear in linears:
        weight, bias = linear.args[1], linear.args[2] if len(linear.args) > 2 else None
        assert isinstance(weight, fx.Node)
        name = str(weight.target)
        with editor.before(linear):
            parts = [
                editor.weight(_part(program, name, LOW, 0, low)),
                editor.weight(_part(program, name, HIGH, low, width)),
            ]
            one = editor.call(aten.linear.default, first, parts[0])
            other = editor.call(aten.linear.default, rest, parts[1], bias)
            total = editor.call(aten.add.Tensor, one, other)
        editor.replace(linear, total)


def _part(program: Program, name: str, part: str, start: int, stop: int) -> str:
    """Defines some input channels of a weight as a weight, and returns its name."""
    stem = name.removesuffix(".weight")
    made = f"{stem}.{part}{name[len(stem) :]}"
    if made not in program.weights:
        spec = program.weights.spec(name)
        program.weights.derive(
            made,
            (name,),
            lambda weight: weight[:, start:stop],
            TensorSpec((spec.shape[0], stop - start), spec.dtype),
            exact=True,
            label="slice",
        )
    return made
