"""Symbolic sizes as text over named symbols, and back, without evaluating foreign code.

A size is written as Python arithmetic: ``"s0 + s1"``, ``"(s0//2)"``, ``"Max(1, s0)"``.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    free_symbols,
)

_MAX_LENGTH = 4096
_MAX_DEPTH = 64
_MAX_HINT = 1 << 30

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.USub: operator.neg,
    ast.Invert: torch.sym_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}

_FUNCTIONS: Mapping[str, tuple[int, Callable[..., Any]]] = {
    "Max": (2, torch.sym_max),
    "Min": (2, torch.sym_min),
    "Mod": (2, operator.mod),
    "PythonMod": (2, operator.mod),
    "FloorDiv": (2, operator.floordiv),
    "CleanDiv": (2, operator.floordiv),
    "IntTrueDiv": (2, operator.truediv),
    "FloatTrueDiv": (2, operator.truediv),
    "PowByNatural": (2, operator.pow),
    "FloatPow": (2, operator.pow),
    "Eq": (2, operator.eq),
    "Ne": (2, operator.ne),
    "ToFloat": (1, torch.sym_float),
    "FloorToInt": (1, math.floor),
    "CeilToInt": (1, math.ceil),
    "TruncToInt": (1, math.trunc),
}
"""Functions that torch's expressions print: number of arguments (at least) and meaning."""


Number = int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool
"""What a node computes that is no tensor."""


class SizeWriter:
    """Writes sizes, over symbols that it names ``s0, s1, ...`` (``u`` where data decide).

    Args:
        values: All that will be written, and more: tensors, symbolic numbers, lists of them.

    Attributes:
        hints: Name of each symbol to an example of it; None if it depends on data.
    """

    def __init__(self, values: Iterable[Any]) -> None:
        found: dict[sympy.Symbol, ShapeEnv] = {}
        for value in values:
            _collect(value, found)
        self.hints: dict[str, int | None] = {}
        self._names: dict[sympy.Symbol, sympy.Symbol] = {}
        # The order of names decides in which order sums are printed: it is kept.
        for symbol in sorted(found, key=str):
            hint = found[symbol].backed_var_to_val.get(symbol)
            name = f"{'u' if hint is None else 's'}{len(self._names)}"
            self._names[symbol] = sympy.Symbol(name, integer=True)
            self.hints[name] = None if hint is None else int(hint)

    def write(self, value: Number) -> int | float | bool | str:
        """A size, number or condition: text if it is symbolic, else itself.

        Raises:
            ValueError: If the expression has no text form.
        """
        if isinstance(value, (bool, int, float)):
            return value
        text = str(sympy.sympify(value.node.expr).xreplace(self._names))
        parse(text)
        return text


def _collect(value: Any, found: dict[sympy.Symbol, ShapeEnv]) -> None:
    if isinstance(value, Tensor):
        value = (*value.shape, *value.stride())
    if isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        found.update(dict.fromkeys(free_symbols(value), value.node.shape_env))


class SizeReader:
    """Reads sizes back, over symbols of its own.

    Args:
        hints: As `SizeWriter` left them.

    Attributes:
        mode: The fake tensor mode that owns the symbols.

    Raises:
        ValueError: If a hint is not a size.
    """

    def __init__(self, hints: Mapping[str, int | None]) -> None:
        self._environment = _NamedShapeEnv(list(hints))
        self.mode = FakeTensorMode(shape_env=self._environment, allow_non_fake_inputs=True)
        self._symbols = {name: self._symbol(name, hint) for name, hint in hints.items()}

    def read(self, value: Any) -> Any:
        """The size, number or condition that `SizeWriter.write` wrote.

        Raises:
            ValueError: If it is none.
        """
        if isinstance(value, (bool, int, float)):
            return value
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no size")
        try:
            return self._evaluate(parse(value))
        except (TypeError, ArithmeticError) as error:
            raise ValueError(f"the size '{value}' cannot be computed: {error}") from error

    def _symbol(self, name: str, hint: int | None) -> torch.SymInt:
        if hint is None:
            return self._environment.create_unbacked_symint()
        if not 0 <= hint <= _MAX_HINT:
            raise ValueError(f"the example {hint} of the size '{name}' is out of range")
        # Sizes 0 and 1 would be taken for constants.
        example = torch.empty(max(hint, 2), dtype=torch.uint8, device="meta")
        context: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC])
        fake = self.mode.from_tensor(example, symbolic_context=context, source=ConstantSource(name))
        size: Any = fake.shape[0]
        return size  # type: ignore[no-any-return]

    def _evaluate(self, tree: ast.expr) -> Any:
        match tree:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                if name not in self._symbols:
                    raise ValueError(f"the symbol '{name}' is not declared")
                return self._symbols[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](self._evaluate(left), self._evaluate(right))
            case ast.UnaryOp(op=op, operand=operand):
                return _OPERATORS[type(op)](self._evaluate(operand))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return _OPERATORS[type(op)](self._evaluate(left), self._evaluate(right))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                values = [self._evaluate(argument) for argument in arguments]
                count, function = _FUNCTIONS[name]
                result = function(*values[:count])
                for value in values[count:]:
                    result = function(result, value)
                return result
        raise ValueError(f"'{ast.unparse(tree)}' is no size")


class _NamedShapeEnv(ShapeEnv):
    """Gives declared symbols numbers that sort as they were declared.

    Otherwise a symbol's number is a hash of where it came from.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        # Names are compared as text: all numbers have the same length.
        first = 10 ** max(1, len(str(len(names))))
        self._numbers = {name: first + i for i, name in enumerate(names)}
        self.unique_ids.update(self._numbers.values())

    def _generate_unique_id(self, source_name: str) -> int:
        # A symbol comes from the size of a tensor that is called like it: "s0.size()[0]".
        number = self._numbers.get(source_name.partition(".")[0])
        return super()._generate_unique_id(source_name) if number is None else number


def parse(text: str) -> ast.expr:
    """The syntax tree of a size, which holds nothing but what `SizeReader` evaluates.

    Raises:
        ValueError: If the text is something else.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"a size is written in {len(text)} characters")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"'{text}' is no size") from error
    _check(tree, text, _MAX_DEPTH)
    return tree


def _check(tree: ast.expr, text: str, depth: int) -> None:
    children: list[ast.expr]
    match tree:
        case ast.Constant(value=int() | float() as value) if abs(value) < 2**62:
            children = []
        case ast.Name():
            children = []
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(exponent))) if (
            0 <= exponent <= 8
        ):
            children = [left]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS and not isinstance(
            op, ast.Pow
        ):
            children = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            children = [operand]
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            children = [left, right]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if (
            name in _FUNCTIONS
            and len(arguments) >= _FUNCTIONS[name][0]
            and (len(arguments) == _FUNCTIONS[name][0] or name in ("Max", "Min"))
        ):
            children = arguments
        case _:
            raise ValueError(f"'{text}' is no size that can be written")
    if depth == 0:
        raise ValueError(f"'{text}' is nested too deeply")
    for child in children:
        _check(child, text, depth - 1)
