"""The text form of a program: stable under renumbering, so that tests can compare it.

Nodes are numbered in order, sizes are renamed ``s0, s1, ...`` in order of appearance, weights are
written by name where they are used.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.sizes import expression

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def format_program(program: Program) -> str:
    """A program as text, one line per node.

    Example:
        ::

            program(%input_ids: i64[s0, s1]) {canonical}
              %0: f32[s0, s1, 64] = aten.embedding(@embed.weight, %input_ids)
              return %0
    """
    return _Printer(program).render()


def format_target(target: Any) -> str:
    """An operator's short name: ``aten.add`` for ``aten.add.Tensor``, ``qc.rope``, ``py.mul``."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._schema.name.split('::')[1]}"
    return f"py.{getattr(target, '__name__', str(target))}"


class _Printer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.names: dict[fx.Node, str] = {}
        self.ranks = _ranks(program)
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.sizes: dict[sympy.Expr, str] = {}

    def render(self) -> str:
        for node, port in zip(self.program.inputs, self.program.signature.inputs, strict=True):
            self.names[node] = f"%{port.name}"
        inputs = ", ".join(f"{self.names[n]}: {self.type_of(n)}" for n in self.program.inputs)
        facts = ", ".join(sorted(fact.value for fact in self.program.facts))
        lines = [f"program({inputs}) {{{facts}}}"]
        for node in self.program.graph.nodes:
            if node.op == "get_attr":
                self.names[node] = f"@{node.target}"
            elif node.op == "call_function":
                self.names[node] = f"%{len(lines) - 1}"
                lines.append(f"  {self.names[node]}: {self.type_of(node)} = {self.call(node)}")
        lines.append(f"  return {', '.join(self.value(node) for node in self.program.results)}")
        return "\n".join(lines) + "\n"

    def call(self, node: fx.Node) -> str:
        arguments = [self.value(argument) for argument in node.args]
        arguments += [f"{key}={self.value(value)}" for key, value in node.kwargs.items()]
        return f"{format_target(node.target)}({', '.join(arguments)})"

    def value(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.value(item) for item in value)}]"
        if isinstance(value, torch.dtype):
            return _DTYPES.get(value, str(value))
        if isinstance(value, float):
            return f"{value:.9g}"
        return str(value)

    def type_of(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = ", ".join(self.size(size) for size in value.shape)
            return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{sizes}]"
        if isinstance(value, (torch.SymInt, int)):
            return f"size({self.size(value)})"
        return type(value).__name__

    def size(self, size: int | torch.SymInt) -> str:
        term = expression(size)
        if term not in self.sizes:
            # Renamed before it is printed: printing sorts terms by name.
            self.sizes[term] = str(term.xreplace(self.renamed_symbols(term)))
        return self.sizes[term]

    def renamed_symbols(self, term: sympy.Expr) -> dict[sympy.Symbol, sympy.Symbol]:
        symbols = sorted(term.free_symbols, key=lambda symbol: (self.rank(symbol), symbol.name))
        for symbol in symbols:
            name = f"s{len(self.symbols)}"
            self.symbols.setdefault(symbol, sympy.Symbol(name, **symbol.assumptions0))
        return {symbol: self.symbols[symbol] for symbol in symbols}

    def rank(self, symbol: sympy.Symbol) -> int:
        """Where a symbol first stands alone; in a sum, nothing but its name tells its place."""
        return self.ranks.get(symbol, len(self.ranks))


def _ranks(program: Program) -> dict[sympy.Symbol, int]:
    found: dict[sympy.Symbol, int] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt) and isinstance(expression(size), sympy.Symbol):
                found.setdefault(expression(size), len(found))
    return found
