"""Sizes that vary become numbers, for machines that plan memory before they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from qcompile.errors import TargetError
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.sizes import expression
from qcompile.ir.types import Role
from qcompile.passes.infra import Context, Exact, Pass, PassResult

SIZES = ("batch", "query", "past")
"""What can be fixed: rows; new tokens of a row; tokens of a row that the cache holds."""

_AXES: Mapping[Role, Mapping[int, str]] = {
    Role.INPUT_IDS: {0: "batch", 1: "query"},
    Role.PAST_KEY: {0: "batch", 2: "past"},
}


class FixSizes(Pass):
    """``input_ids: i64[s0, s1]``  =>  ``input_ids: i64[1, 64]``, and all that follows from it.

    Args:
        sizes: Names of `SIZES` to numbers. Sizes that are not named stay as they are.

    Raises:
        TargetError: If a number is less than 1.
    """

    numerics = Exact()

    def __init__(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            if size < 1:
                raise TargetError(f"{name} is {size}", remedy="use 1 or more, or leave it out")
        self._sizes = dict(sizes)

    def run(self, program: Program, context: Context) -> PassResult:
        """Gives the inputs their sizes, and infers those of every call again.

        Raises:
            TargetError: If the program has no such size, or has it fixed already.
        """
        del context
        values = self._values(program)
        editor = Editor(program)
        result = PassResult()
        for node in program.inputs:
            node.meta["val"] = _fixed(program, node.meta["val"], values)
        for node in program.calls():
            node.meta["val"] = editor.infer(node)
            result.rewrites += 1
        return result

    def _values(self, program: Program) -> dict[sympy.Symbol, sympy.Integer]:
        """The program's symbols to numbers."""
        found = _symbols(program)
        for name in self._sizes:
            if name not in found:
                known = ", ".join(found) or "none"
                raise TargetError(
                    f"'{program.provenance.name}' has no size '{name}' that varies",
                    remedy=f"sizes that can be fixed: {known}",
                )
        return {found[name]: sympy.Integer(size) for name, size in self._sizes.items()}


def _symbols(program: Program) -> dict[str, sympy.Symbol]:
    """Names to the symbols of the inputs' sizes; for modules, the first axis is the batch."""
    ports = list(zip(program.inputs, program.signature.inputs, strict=True))
    axes = _AXES if program.signature.has(Role.INPUT_IDS) else {Role.TENSOR: {0: "batch"}}
    found: dict[str, sympy.Symbol] = {}
    for node, port in ports:
        shape = node.meta["val"].shape
        for axis, name in axes.get(port.role, {}).items():
            symbol = expression(shape[axis]) if axis < len(shape) else None
            if isinstance(symbol, sympy.Symbol):
                found.setdefault(name, symbol)
    return found


def _fixed(program: Program, fake: Tensor, values: Mapping[sympy.Symbol, sympy.Integer]) -> Tensor:
    sizes = [_size(size, values) for size in fake.shape]
    with program.fake_mode:
        return torch.empty(sizes, dtype=fake.dtype, device="meta")


def _size(size: Any, values: Mapping[sympy.Symbol, sympy.Integer]) -> Any:
    expr = expression(size).xreplace(dict(values))
    if expr.is_Integer:
        return int(expr)
    if expr == expression(size):
        return size
    return size.node.shape_env.create_symintnode(expr, hint=None)
