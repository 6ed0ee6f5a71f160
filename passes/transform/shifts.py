"""A shift goes into biases: those of what writes a site, and those of what reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qcompile.analysis.families import Port, PortRole
from qcompile.analysis.sites import Site
from qcompile.ir.program import Program
from qcompile.passes.transform.bias import derive_bias
from qcompile.passes.transform.values import Shift, Transform

_LINEAR = torch.ops.aten.linear.default


def absorb_shifts(program: Program, site: Site, transforms: Sequence[Transform]) -> None:
    """Adds ``b`` to all that writes a site, and takes ``W b`` from the biases of what reads it.

    ``linear(x, W, c)``  =>  ``linear(x + b, W, c - W b)``. A linear without a bias is given one;
    norms add to their bias, embeddings to every row.

    Args:
        program: Edited in place.
        site: One where a shift is legal.
        transforms: A `Shift` per block.

    Raises:
        ValueError: If some of them are no shifts.
    """
    for block, transform in zip(site.blocks, transforms, strict=True):
        if not isinstance(transform, Shift):
            raise ValueError("shifts and matrices are absorbed one after the other")
        for port in block:
            linears = _linears(program, port.weight)
            if port.role is PortRole.SINK:
                for linear in linears:
                    _take_from_bias(program, linear, port, transform.by)
            elif linears:
                for linear in linears:
                    _add_to_bias(program, linear, port, transform.by)
            elif port.role is PortRole.SOURCE:
                _add_to_weight(program, port, transform.by)


def _take_from_bias(program: Program, linear: fx.Node, port: Port, by: Tensor) -> None:
    def function(bias: Tensor, weight: Tensor) -> Tensor:
        return bias - weight.narrow(1, port.start, port.size) @ by

    derive_bias(program, linear, (port.weight,), function, "shift")


def _add_to_bias(program: Program, linear: fx.Node, port: Port, by: Tensor) -> None:
    def function(bias: Tensor) -> Tensor:
        bias = bias.clone()
        bias[port.start : port.start + port.size] += by
        return bias

    derive_bias(program, linear, (), function, "shift")


def _add_to_weight(program: Program, port: Port, by: Tensor) -> None:
    """To a bias, or to every row of a table."""

    def function(value: Tensor) -> Tensor:
        value = value.clone()
        part = value.narrow(port.axis, port.start, port.size)
        part += by if port.axis == value.dim() - 1 else by.unsqueeze(-1)
        return value

    spec = program.weights.spec(port.weight)
    program.weights.derive(port.weight, (port.weight,), function, spec, exact=False, label="shift")


def _linears(program: Program, weight: str) -> list[fx.Node]:
    """The linears that multiply with a weight."""
    return [
        linear
        for linear in program.calls(_LINEAR)
        if isinstance(linear.args[1], fx.Node) and linear.args[1].target == weight
    ]
