"""Cached keys and values of two programs, compared in the basis of the captured model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import dialect
from qcompile.ir.program import Program


def to_cache_basis(program: Program, node: fx.Node, value: Tensor) -> Tensor:
    """A past of the captured model, as a program wants it.

    Args:
        program: The program.
        node: One of its inputs.
        value: ``[B, heads, T, D]`` for a past; other inputs stay as they are.
    """
    basis = program.cache_basis.get(str(node.target))
    return value if basis is None else value @ basis.to(value.dtype)


def from_cache_basis(program: Program, node: fx.Node, value: Any) -> Any:
    """The inverse: what a program keeps, as the captured model would; other values stay.

    Args:
        program: The program.
        node: Any of its nodes.
        value: Its value.
    """
    if node.target is not dialect.kv_append:
        return value
    past = node.args[0]
    basis = program.cache_basis.get(str(past.target)) if isinstance(past, fx.Node) else None
    return value if basis is None else value @ torch.linalg.inv(basis).to(value.dtype)
