"""What a transform does to cached keys and values, kept for the checks of equivalence."""

from __future__ import annotations

import torch

from qcompile.ir.program import Program
from qcompile.passes.transform.values import Transform


def change_cache_basis(program: Program, name: str, start: int, transform: Transform) -> None:
    """Notes that the cache of an input holds transformed rows from now on.

    Args:
        program: Edited in place.
        name: Of the input, ``[B, heads, T, D]``.
        start: First channel of the stretch, over heads side by side; it lies within one head.
        transform: What the stretch is multiplied by.
    """
    node = next(node for node in program.inputs if node.target == name)
    heads, width = (int(node.meta["val"].shape[axis]) for axis in (1, 3))
    known = program.cache_basis.get(name)
    if known is None:
        known = torch.eye(width, dtype=torch.float64).repeat(heads, 1, 1)
    head, first = divmod(start, width)
    if first + transform.size > width:
        raise ValueError(f"a transform of order {transform.size} across heads of width {width}")
    basis = known.clone()
    stretch = slice(first, first + transform.size)
    basis[head, :, stretch] = transform.linear_part().apply(basis[head, :, stretch])
    program.cache_basis = {**program.cache_basis, name: basis}
