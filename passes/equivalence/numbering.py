"""Value numbers: which values of two programs are the same by construction.

Two nodes have one number if they apply one operator to values with the same numbers. Numbers can be
united when a proof has shown two values equal, and what is computed from them is then the same too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor, fx

from qcompile.analysis.stages import Flow
from qcompile.ir.program import Program
from qcompile.ir.weights import Apply, Expression
from qcompile.passes.equivalence.evaluate import weight_key


class Numbering:
    """Numbers for the values of two programs.

    Args:
        before: The program before.
        after: The program after; its nodes are numbered one by one, with `number`.
    """

    def __init__(self, before: Program, after: Program) -> None:
        self._table: dict[Hashable, int] = {}
        self._parent: list[int] = []
        self._sides: list[int] = []
        self._numbers: dict[fx.Node, int] = {}
        self._before, self._after = before, after
        self._ports = {
            node: port.name
            for program in (before, after)
            for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        }

    def number_before(self, node: fx.Node) -> int:
        """Numbers a node of the program before."""
        key = self._key(self._before, node)
        number = self._table.get(key)
        if number is None:
            number = self._table[key] = self._fresh()
        return self._give(node, number, _BEFORE)

    def number_after(self, node: fx.Node) -> bool:
        """Numbers a node of the program after; whether the program before has such a value."""
        number = self._table.get(self._key(self._after, node))
        known = number is not None
        self._give(node, self._fresh() if number is None else number, _AFTER)
        return known

    def of(self, node: fx.Node) -> int:
        """The number of a node."""
        return self._find(self._numbers[node])

    def unite(self, one: fx.Node, other: fx.Node) -> None:
        """Makes two values the same."""
        kept, gone = self.of(one), self.of(other)
        if kept != gone:
            self._parent[gone] = kept
            self._sides[kept] |= self._sides[gone]

    def is_shared(self, node: fx.Node) -> bool:
        """Whether both programs have this value."""
        return self._sides[self.of(node)] == _BEFORE | _AFTER

    def argument_pairs(self, one: fx.Node, other: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
        """The arguments in which two calls differ; None if they differ in more than values."""
        pairs: list[tuple[fx.Node, fx.Node]] = []

        def walk(a: Any, b: Any) -> bool:
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                if self.of(a) != self.of(b):
                    pairs.append((a, b))
                return True
            if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
                return len(a) == len(b) and all(map(walk, a, b))
            return type(a) is type(b) and repr(a) == repr(b)

        if one.kwargs.keys() != other.kwargs.keys() or not walk(one.args, other.args):
            return None
        if not all(walk(one.kwargs[key], other.kwargs[key]) for key in one.kwargs):
            return None
        return pairs

    def _give(self, node: fx.Node, number: int, side: int) -> int:
        self._numbers[node] = number
        self._sides[self._find(number)] |= side
        return number

    def _fresh(self) -> int:
        self._parent.append(len(self._parent))
        self._sides.append(0)
        return len(self._parent) - 1

    def _find(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def _key(self, program: Program, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            return ("input", self._ports[node])
        if node.op == "get_attr":
            return ("weight", weight_key(program, str(node.target)))
        return ("call", node.target, *freeze((node.args, node.kwargs), self.of))


_BEFORE, _AFTER = 1, 2


def freeze(value: Any, of: Callable[[fx.Node], Hashable]) -> tuple[Hashable, ...]:
    """Arguments as something that can be hashed, nodes replaced by what `of` says of them."""
    if isinstance(value, fx.Node):
        return ("node", of(value))
    if isinstance(value, (list, tuple)):
        return ("list", *(freeze(item, of) for item in value))
    if isinstance(value, dict):
        return ("dict", *((key, freeze(item, of)) for key, item in sorted(value.items())))
    # By their text: 1, 1.0 and True are equal, and not the same.
    return (type(value).__name__, repr(value))


class Anatomy:
    """The structure of values that do not depend on content, blind to names and layers.

    Args:
        program: The program.
        flow: Its flow.
    """

    def __init__(self, program: Program, flow: Flow) -> None:
        self._program = program
        self._known: dict[fx.Node, Hashable] = {}
        self._elements: dict[fx.Node, int] = {}
        self._roles = {
            node: port.role
            for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        }
        for node in flow.order:
            if node not in flow.dynamic:
                self._known[node] = hash(self._describe(node))
                self._elements[node] = self._count(node)

    def of(self, node: fx.Node) -> Hashable:
        """Equal for values that are computed alike from inputs and weights of the same shapes."""
        return self._known[node]

    def elements(self, node: fx.Node) -> int:
        """Elements of the largest weight that a value is computed from."""
        return self._elements[node]

    def _count(self, node: fx.Node) -> int:
        if node.op == "get_attr":
            return self._program.weights.spec(str(node.target)).elements
        return max((self._elements[n] for n in node.all_input_nodes), default=0)

    def _describe(self, node: fx.Node) -> Hashable:
        if node.op == "placeholder":
            return (self._roles[node].value, describe_value(node))
        if node.op == "get_attr":
            name = str(node.target)
            return (self._program.weights.spec(name), _shape_of(self._expression(name)))
        return (node.target, freeze((node.args, node.kwargs), self.of))

    def _expression(self, name: str) -> Expression:
        return self._program.weights.expression(name)


def describe_value(node: fx.Node) -> str:
    """Type and shape of a value."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    return type(value).__name__


def _shape_of(expression: Expression) -> Hashable:
    if isinstance(expression, Apply):
        return (expression.label, *map(_shape_of, expression.operands))
    return type(expression).__name__
