"""Cached keys and values of two programs, compared in the basis of the captured model."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.types import Role

_PAST_OF: Mapping[Role, Role] = MappingProxyType(
    {Role.PRESENT_KEY: Role.PAST_KEY, Role.PRESENT_VALUE: Role.PAST_VALUE}
)


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
        node: Any of its nodes; those that it returns as keys and values to keep are meant.
        value: Its value.
    """
    if not program.cache_basis:
        return value
    basis = program.cache_basis.get(_past_of(program, node))
    return value if basis is None else value @ torch.linalg.inv(basis).to(value.dtype)


def _past_of(program: Program, result: fx.Node) -> str:
    """The name of the input that a result takes the place of; empty if there is none."""
    for port, node in zip(program.signature.outputs, program.results, strict=True):
        if node is result and port.role in _PAST_OF:
            wanted = (_PAST_OF[port.role], port.layer)
            for past, place in zip(program.signature.inputs, program.inputs, strict=True):
                if (past.role, past.layer) == wanted:
                    return str(place.target)
    return ""
