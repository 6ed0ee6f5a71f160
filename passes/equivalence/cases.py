"""Inputs to check programs with: small, random, and valid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import sympy
import torch
from torch import Tensor, fx

from qcompile.errors import EquivalenceError
from qcompile.ir import size_numbers
from qcompile.ir.program import Program
from qcompile.ir.sizes import expression
from qcompile.ir.types import Port, Role
from qcompile.passes.equivalence.cache_basis import to_cache_basis

aten = torch.ops.aten

_BATCH = 2

_FALLBACK_ROWS = 2
"""Integers whose meaning nothing tells are 0 or 1: valid as flags, and as rows of any table."""


class Sizes:
    """Numbers for symbolic sizes. Programs have thousands of sizes, few different ones.

    Args:
        symbols: What each symbol stands for.
    """

    def __init__(self, symbols: Mapping[sympy.Symbol, int]) -> None:
        self._symbols = symbols
        self._known: dict[sympy.Expr, int | None] = {}

    def number(self, size: int | torch.SymInt) -> int | None:
        """A size in numbers; None if it depends on data."""
        if isinstance(size, int):
            return size
        term = expression(size)
        if term not in self._known:
            value = term.subs(self._symbols)
            self._known[term] = int(value) if value.is_Integer and value >= 0 else None
        return self._known[term]

    def shape(self, value: Tensor) -> tuple[int, ...]:
        """The shape of a fake tensor in numbers, which must not depend on data."""
        numbers = tuple(map(self.number, value.shape))
        assert None not in numbers
        return cast("tuple[int, ...]", numbers)


@dataclass(frozen=True)
class Case:
    """One set of inputs for a program and for what passes make of it.

    Attributes:
        label: What is special about it, for messages.
        values: Input tensors by the name of their port, floating ones in float64.
        sizes: Numbers for the symbolic sizes.
        keep: ``[batch, past + query]``, True where a position is no padding; None where the
            program has no attention mask.
        query: Tokens per row; 0 for programs without tokens.
    """

    label: str
    values: Mapping[str, Tensor]
    sizes: Sizes
    keep: Tensor | None
    query: int

    def bind(self, program: Program) -> dict[fx.Node, Tensor]:
        """The value of each placeholder.

        Raises:
            EquivalenceError: If the program has an input that the one before did not have.
        """
        bound = {}
        for node, port in zip(program.inputs, program.signature.inputs, strict=True):
            if port.role is Role.LOGIT_POSITIONS:
                bound[node] = torch.arange(self.query)
            elif port.name in self.values:
                bound[node] = to_cache_basis(program, node, self.values[port.name])
            else:
                raise EquivalenceError(
                    f"the program has an input '{port.name}' that it did not have before"
                )
        return bound


def language_cases(program: Program, seed: int) -> tuple[Case, ...]:
    """For a program that keeps a cache: a prompt with left padding, then tokens over a past.

    Args:
        program: The program before the pass.
        seed: For the random ids and pasts.
    """
    return (
        _case(program, seed, "without a past", past=0, query=6, padding=2),
        _case(program, seed + 1, "over a past of 4 tokens", past=4, query=3, padding=2),
    )


def cases(program: Program, seed: int, *, traced_sizes: bool = False) -> tuple[Case, ...]:
    """The cases that a program is checked on.

    Args:
        program: The program before the pass.
        seed: For everything random.
        traced_sizes: Whether symbolic sizes without a meaning take the values that the program
            was traced with, for programs that do not run with small ones.
    """
    if program.signature.is_causal_lm:
        return language_cases(program, seed)
    if program.signature.has(Role.INPUT_IDS):
        return (_case(program, seed, "with padding", past=0, query=6, padding=2),)
    return (_plain_case(program, seed, traced_sizes),)


def _case(program: Program, seed: int, label: str, *, past: int, query: int, padding: int) -> Case:
    ports = _ports(program)
    lengths = {
        Role.INPUT_IDS: (_BATCH, query),
        Role.TOKEN_TYPE_IDS: (_BATCH, query),
        Role.POSITION_IDS: (_BATCH, query),
        Role.ATTENTION_MASK: (_BATCH, past + query),
        Role.PAST_KEY: (_BATCH, None, past, None),
        Role.PAST_VALUE: (_BATCH, None, past, None),
        Role.PAST_STATE: (_BATCH,),
    }
    symbols: dict[sympy.Symbol, int] = {}
    for node, port in ports:
        wanted = lengths.get(port.role, ())
        for size, number in zip(node.meta["val"].shape, wanted, strict=False):
            symbol = expression(size)
            if isinstance(symbol, sympy.Symbol) and number is not None:
                symbols.setdefault(symbol, number)
    sizes = Sizes(size_numbers.small_sizes(program, symbols))
    shapes = {node: sizes.shape(node.meta["val"]) for node, _ in ports}
    generator = torch.Generator().manual_seed(seed)
    has_mask = any(port.role is Role.ATTENTION_MASK for _, port in ports)
    batch, query = next(shapes[node] for node, port in ports if port.role is Role.INPUT_IDS)
    keep = torch.ones(batch, past + query, dtype=torch.bool)
    if has_mask:
        keep[0, :padding] = False
    values = {}
    for node, port in ports:
        match port.role:
            case Role.ATTENTION_MASK:
                values[port.name] = keep.to(torch.int64)
            case Role.POSITION_IDS:
                values[port.name] = (keep.cumsum(-1) - 1).clamp(min=0)[:, past:]
            case _:
                values[port.name] = _random(node, shapes[node], generator)
    return Case(label, values, sizes, keep if has_mask else None, query)


def _plain_case(program: Program, seed: int, traced_sizes: bool) -> Case:
    sizes = Sizes(
        (size_numbers.traced_sizes if traced_sizes else size_numbers.small_sizes)(program)
    )
    generator = torch.Generator().manual_seed(seed)
    values = {
        port.name: _random(node, sizes.shape(node.meta["val"]), generator)
        for node, port in _ports(program)
    }
    label = "with the traced sizes" if traced_sizes else "with small sizes"
    return Case(label, values, sizes, None, 0)


def _ports(program: Program) -> list[tuple[fx.Node, Port]]:
    return [
        (node, port)
        for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        if port.role is not Role.LOGIT_POSITIONS
    ]


def _random(node: fx.Node, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    dtype = node.meta["val"].dtype
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return torch.randint(_rows(node), shape, generator=generator).to(dtype)


def _rows(ids: fx.Node) -> int:
    """How many rows the smallest table has that is read at these indices."""
    rows = [
        int(table.meta["val"].shape[0])
        for user in ids.users
        if user.target is aten.embedding.default
        for table in user.args[:1]
        if isinstance(table, fx.Node)
    ]
    return min(rows, default=_FALLBACK_ROWS)
