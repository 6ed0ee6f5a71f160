"""The inputs of linears that a method transforms, and why it leaves the others as they are."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from qcompile.analysis.roles import linears_by_input, weight_name
from qcompile.ir.program import Program
from qcompile.passes.infra import Skip
from qcompile.passes.quantize.layers import output_projection
from qcompile.passes.quantize.policy import matches_any

WantedInput = tuple[fx.Node, list[fx.Node]]
"""A value, and the linears among its readers whose inputs are to be transformed."""


def wanted_inputs(program: Program, ignore: Iterable[str]) -> tuple[list[WantedInput], list[Skip]]:
    """Values that linears over stored weights read, in graph order, each with these linears.

    The linear that makes the logits is left out, as are those that a recipe ignores.

    Args:
        program: It is not changed.
        ignore: Patterns on names of weights.

    Returns:
        The values with their linears, and a skip for each linear that is left out.
    """
    head = output_projection(program)
    patterns = tuple(ignore)
    wanted: list[WantedInput] = []
    skips: list[Skip] = []
    for value, linears in linears_by_input(program):
        kept = []
        for linear in linears:
            name = weight_name(linear)
            if linear is head:
                skips.append(Skip(name, "it makes the logits"))
            elif matches_any(patterns, name):
                skips.append(Skip(name, "its input is kept by the recipe"))
            else:
                kept.append(linear)
        if kept:
            wanted.append((value, kept))
    return wanted, skips
