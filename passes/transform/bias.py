"""Biases that change or come into being when a transform goes into a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.weights import TensorSpec


def bias_of(linear: fx.Node) -> fx.Node | None:
    """The bias that a linear reads."""
    bias = linear.args[2] if len(linear.args) > 2 else None
    return bias if isinstance(bias, fx.Node) else None


def derive_bias(
    program: Program,
    linear: fx.Node,
    operands: tuple[str, ...],
    function: Callable[..., Tensor],
    label: str,
) -> None:
    """Changes a linear's bias, or gives it one; a bias that others read stays as it is for them.

    Args:
        program: Edited in place.
        linear: A call of `aten.linear`, whose bias is stored or absent.
        operands: Entries of the weight store, as they are now.
        function: Of the bias so far (zeros ``[N]`` where there is none) and of the operands, in
            float64; gives the new one.
        label: A short name for people.
    """
    editor = Editor(program)
    bias = bias_of(linear)
    weight = linear.args[1]
    assert isinstance(weight, fx.Node)
    rows = int(weight.meta["val"].shape[0])
    spec = TensorSpec((rows,), torch.float32)
    name = _unused(program, f"{weight.target}_bias")
    if bias is not None and _readers(program, str(bias.target)) == {linear}:
        name = str(bias.target)
    if bias is None:

        def from_zero(*values: Tensor) -> Tensor:
            return function(torch.zeros(rows, dtype=torch.float64), *values)

        program.weights.derive(name, operands, from_zero, spec, exact=False, label=label)
    else:
        own = (str(bias.target), *operands)
        program.weights.derive(name, own, function, spec, exact=False, label=label)
    with editor.before(linear):
        linear.args = (*linear.args[:2], editor.weight(name))


def _readers(program: Program, name: str) -> set[fx.Node]:
    return {
        u for reference in program.parameters() if reference.target == name for u in reference.users
    }


def _unused(program: Program, stem: str) -> str:
    """A name for a new entry; the stem itself where it is free."""
    name, i = stem, 2
    while name in program.weights:
        name, i = f"{stem}{i}", i + 1
    return name
