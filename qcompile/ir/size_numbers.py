"""Numbers for the symbolic sizes of a program, to run it or parts of it with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.ir.sizes import expression, is_symbolic
from qcompile.ir.verify import size_identities

_SIZES = (3, 5, 7, 11, 13, 17)
"""Sizes without a meaning, in order: different, so that a mix-up of axes shows."""


def small_sizes(
    program: Program, known: Mapping[sympy.Symbol, int] | None = None
) -> dict[sympy.Symbol, int]:
    """Small numbers for all symbols in the shapes of inputs, as far as their bounds let them.

    Args:
        program: The program.
        known: Symbols that have a number already.
    """
    least: dict[sympy.Symbol, int] = {}
    for size in _symbolic_sizes(program):
        for symbol in sorted(expression(size).free_symbols, key=str):
            if symbol not in least:
                least[symbol] = int(size.node.shape_env.bound_sympy(symbol).lower)
    numbers = dict(known or {})
    free = [symbol for symbol in least if symbol not in numbers]
    for i, symbol in enumerate(free):
        numbers[symbol] = max(_SIZES[i % len(_SIZES)], least[symbol])
    for total, parts in size_identities(program).items():
        if total.is_Symbol:
            numbers[total] = int(parts.subs(numbers))
    return numbers


def traced_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The sizes of the example that a program was traced with; small ones where none is known."""
    return small_sizes(
        program,
        {
            expression(size): int(size.node.hint)
            for size in _symbolic_sizes(program)
            if isinstance(expression(size), sympy.Symbol) and size.node.hint is not None
        },
    )


def filling_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The small sizes if no tensor of the program is empty under them, else the traced ones.

    Where strides divide sizes, as in convolutions, a small image leaves nothing.
    """
    numbers = small_sizes(program)
    sizes = {
        expression(size)
        for node in program.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor)
        for size in value.shape
        if is_symbolic(size)
    }
    values = (size.subs(numbers) for size in sizes)
    if any(value.is_Integer and value < 1 for value in values):
        return traced_sizes(program)
    return numbers


def _symbolic_sizes(program: Program) -> Iterator[torch.SymInt]:
    for node in program.inputs:
        sizes: tuple[Any, ...] = getattr(node.meta["val"], "shape", ())
        for size in sizes:
            if isinstance(size, torch.SymInt):
                yield size
