"""Finding where a pattern fits, and saying why it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.passes.pattern import (
    Call,
    Choice,
    Kind,
    Marked,
    Pattern,
    Term,
    Variable,
    arrange,
    depth,
    key_of,
    name_of,
    root_targets,
    schema_parameters,
    subterms,
)

_aten = torch.ops.aten

COMMUTATIVE = frozenset(
    {_aten.add.Tensor, _aten.mul.Tensor, _aten.maximum.default, _aten.minimum.default}
    | {_aten.logical_and.default, _aten.logical_or.default}
    | {_aten.bitwise_and.Tensor, _aten.bitwise_or.Tensor}
)
"""Operators whose first two operands may stand in either order (`add` if its alpha is 1)."""

NEEDS = "needs {wanted}, found {node}"

Bound = Mapping[Term | str, Any]
"""What is bound so far: calls and choices by themselves, variables by name."""


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits. ``match["x"]`` is what the variable, or `Named`, x binds.

    Attributes:
        program: The program.
        bindings: Every name of the pattern to a node or a plain value; None where absent.
        outputs: The nodes to be replaced, in the order of the pattern.
        nodes: All calls inside, the outputs among them, in graph order.
        inputs: The boundary: what `nodes` read and are not, in the order they read it.
    """

    program: Program
    bindings: Mapping[str, Any]
    outputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def node(self, name: str) -> fx.Node:
        """The node that a name binds, for names that bind nodes."""
        node = self.bindings[name]
        assert isinstance(node, fx.Node), f"'{name}' binds {node!r}"
        return node

    def value(self, name: str) -> Tensor:
        """The fake tensor of a bound node: its shape and dtype without numbers."""
        value = self.node(name).meta["val"]
        assert isinstance(value, Tensor)
        return value

    def subgraph(self) -> fx.Graph:
        """The matched region by itself, one placeholder for each of `inputs`; see `region`."""
        return region(self.inputs, self.outputs)


def region(inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.Graph:
    """What computes `outputs` from `inputs`, as a graph of its own.

    Args:
        inputs: Where to stop; each becomes a placeholder, in this order, needed or not.
        outputs: What the new graph returns, as a tuple.

    Returns:
        A graph whose placeholders are the inputs, then every other weight and program input that
        is reached. ``meta["source"]`` of a placeholder is the node that it stands for.
    """
    leaves, inside = dict.fromkeys(inputs), set[fx.Node]()
    pending = [node for node in outputs if node not in leaves]
    while pending:
        node = pending.pop()
        if node.op != "call_function":
            leaves[node] = None
        elif node not in inside:
            inside.add(node)
            pending += [operand for operand in node.all_input_nodes if operand not in leaves]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in leaves:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {**node.meta, "source": node}
    for node in sorted(inside):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in outputs))
    return graph


@dataclass(frozen=True)
class Miss:
    """Where a match failed.

    Attributes:
        progress: How much was bound before; of several ways to fail, the furthest is told.
        node: The node, or argument, that does not fit.
        where: The part of the pattern, as a chain from the innermost outwards; None for a failure
            of the match as a whole.
        why: A sentence about ``{node}`` and ``{wanted}``. It is put together only when it is asked
            for, since most misses are never told.
        wanted: The term, plain value or node that `why` speaks of.
    """

    progress: int
    node: Any
    where: _Where | None
    why: str
    wanted: Any

    @property
    def reason(self) -> str:
        """``"input of aten.linear: needs qc.rms_norm, found aten.silu 'silu_3'"``."""
        name = f" '{self.node.name}'" if isinstance(self.node, fx.Node) else ""
        return self._tell(_describe(self.node) + name)

    @property
    def kind(self) -> str:
        """The reason without the node's name, so that equal ones can be counted."""
        return self._tell(_describe(self.node))

    def _tell(self, node: str) -> str:
        why = self.why.format(node=node, wanted=_describe(self.wanted))
        return why if self.where is None else f"{_describe_place(self.where)}: {why}"


_Where = tuple[Any, ...]
"""``()`` at the root, else ``(outer place, call term, target, index of operand)``."""


class Matcher:
    """Tries one pattern at one node.

    Attributes:
        miss: After all matches have been drawn, the furthest failure, if there was one.
    """

    def __init__(self, pattern: Pattern, program: Program) -> None:
        self.pattern = pattern
        self.program = program
        self.miss: Miss | None = None

    def matches(self, anchor: fx.Node) -> Iterator[Match]:
        """All ways in which the pattern fits with its first output at `anchor`."""
        for bound in self._value(self.pattern.outputs[0], anchor, {}, ()):
            for complete in self._further_outputs(1, bound):
                match = self._conclude(complete)
                if match is not None:
                    yield match

    def _further_outputs(self, position: int, bound: Bound) -> Iterator[Bound]:
        if position == len(self.pattern.outputs):
            yield bound
            return
        term = self.pattern.outputs[position]
        taken = [bound[key_of(earlier)] for earlier in self.pattern.outputs[:position]]
        candidates = [node for node in _candidates(term, bound) if node not in taken]
        if not candidates:
            self._fail(bound, taken[0], None, "no further {wanted} beside {node}", term)
        for node in candidates:
            for extended in self._value(term, node, bound, ()):
                yield from self._further_outputs(position + 1, extended)

    def _value(self, term: Any, value: Any, bound: Bound, where: _Where) -> Iterator[Bound]:
        if isinstance(term, (list, tuple)):
            yield from self._list(term, value, bound, where)
        elif not isinstance(term, Term):
            if self._is_literal(term, value):
                yield bound
            else:
                self._fail(bound, value, where, NEEDS, term)
        elif key_of(term) in bound:
            known_as = key_of(term)
            known = bound[known_as]
            if known is value or (not isinstance(value, fx.Node) and known == value):
                yield bound
            else:
                self._fail(
                    bound, value, where, "{node} is not what {wanted} is elsewhere", known_as
                )
        elif isinstance(term, Variable):
            if _may_bind(term, value):
                yield {**bound, key_of(term): value}
            else:
                self._fail(bound, value, where, NEEDS, term)
        elif isinstance(term, Call):
            yield from self._call(term, value, bound, where)
        elif isinstance(term, (Choice, Marked)):
            for option in term.options if isinstance(term, Choice) else (term.term,):
                for extended in self._value(option, value, bound, where):
                    yield {**extended, term: value}

    def _call(self, term: Call, value: Any, bound: Bound, where: _Where) -> Iterator[Bound]:
        if not isinstance(value, fx.Node) or value.target not in term.targets:
            self._fail(bound, value, where, NEEDS, term)
            return
        wanted = term.operands(value.target)
        found = arrange(value.target, value.args, value.kwargs)
        if wanted is None or found is None or len(wanted) != len(found):
            self._fail(bound, value, where, "{node} takes other arguments than {wanted}", term)
            return
        places = [(where, term, value.target, index) for index in range(len(wanted))]
        for operands in _orders(value.target, found):
            items = list(zip(wanted, operands, places, strict=True))
            yield from self._all(items, {**bound, term: value})

    def _list(
        self, terms: Sequence[Any], value: Any, bound: Bound, where: _Where
    ) -> Iterator[Bound]:
        if not isinstance(value, (list, tuple)) or len(value) != len(terms):
            self._fail(bound, value, where, NEEDS, terms)
            return
        yield from self._all([(t, v, where) for t, v in zip(terms, value, strict=True)], bound)

    def _all(self, items: list[tuple[Any, Any, _Where]], bound: Bound) -> Iterator[Bound]:
        if not items:
            yield bound
            return
        term, value, where = items[0]
        for extended in self._value(term, value, bound, where):
            yield from self._all(items[1:], extended)

    def _is_literal(self, expected: Any, found: Any) -> bool:
        """Whether a plain value is the one in the pattern; a 0-dim weight counts as its number."""
        if isinstance(found, fx.Node):
            return _is_number(expected) and _is_scalar_weight(self.program, found, expected)
        if _is_number(expected):
            return _is_number(found) and bool(expected == found)
        return type(expected) is type(found) and bool(expected == found)

    def _conclude(self, bound: Bound) -> Match | None:
        """The match, if its inside is used nowhere else and its inputs can be had in time."""
        outputs = tuple(bound[key_of(term)] for term in self.pattern.outputs)
        nodes = {value: None for term, value in bound.items() if isinstance(term, Call)}
        shared = {bound[term] for term in bound if isinstance(term, Marked) and term.shared}
        for node in nodes:
            outside = [user for user in node.users if user not in nodes]
            if outside and node not in shared and node not in outputs:
                why = "{wanted} inside the match is also used outside it, by {node}"
                self._fail(bound, outside[0], None, why, node)
                return None
        for key, value in bound.items():
            if isinstance(key, str) and isinstance(value, fx.Node) and value in nodes:
                self._fail(bound, value, None, "{wanted} binds {node}, inside the match", key)
                return None
        inside = tuple(sorted(nodes))
        inputs = dict.fromkeys(i for node in inside for i in node.all_input_nodes if i not in nodes)
        match = Match(self.program, self._bindings(bound), outputs, inside, tuple(inputs))
        if placement(match) is None:
            why = "{wanted} must be computed before another input of the match can be"
            self._fail(bound, outputs[0], None, why, outputs[0])
            return None
        return match

    def _bindings(self, bound: Bound) -> dict[str, Any]:
        """What every name of the pattern binds."""
        bindings = dict.fromkeys(self.pattern.names)
        for term, value in bound.items():
            name = term if isinstance(term, str) else name_of(term)
            if name:
                bindings[name] = value
        return bindings

    def _fail(self, bound: Bound, node: Any, where: _Where | None, why: str, wanted: Any) -> None:
        if self.miss is None or len(bound) > self.miss.progress:
            self.miss = Miss(len(bound), node, where, why, wanted)


def placement(match: Match) -> tuple[fx.Node, list[fx.Node]] | None:
    """Where replacements go: before a node, once some others have been moved before it, in order.

    With one output that is the output itself. Several are replaced at the first use of any; what
    their inputs need and stands later must move up, which is impossible if it needs an output.
    """
    if len(match.outputs) == 1:
        return match.outputs[0], []
    inside = set(match.nodes)
    uses = [user for output in match.outputs for user in output.users if user not in inside]
    point = min(uses) if uses else match.outputs[-1]
    late: set[fx.Node] = set()
    pending = [node for node in match.inputs if not node < point]
    while pending:
        node = pending.pop()
        if node in inside:
            return None
        if node not in late:
            late.add(node)
            pending += [operand for operand in node.all_input_nodes if not operand < point]
    # A use that an input needs would have to stand before itself.
    return None if point in late else (point, sorted(late))


def _candidates(term: Term, bound: Bound) -> list[fx.Node]:
    """Nodes that may be a further output: users, near enough, of something it shares."""
    shared = [bound[key_of(sub)] for sub in subterms(term) if key_of(sub) in bound]
    nodes = [value for value in shared if isinstance(value, fx.Node)]
    if not nodes:
        return []
    start = min(nodes, key=lambda node: len(node.users))
    level, reached = {start: None}, dict[fx.Node, None]()
    for _ in range(depth(term)):
        level = dict.fromkeys(user for node in level for user in node.users)
        reached |= level
    targets = root_targets(term) or frozenset()
    return sorted(node for node in reached if node.target in targets)


def _orders(target: Any, operands: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield operands
    if target in COMMUTATIVE and (target is not _aten.add.Tensor or operands[2] == 1):
        yield (operands[1], operands[0], *operands[2:])


def _may_bind(variable: Variable, value: Any) -> bool:
    if value is None and variable.optional:
        return True
    match variable.kind:
        case Kind.TENSOR:
            return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)
        case Kind.WEIGHT:
            return isinstance(value, fx.Node) and value.op == "get_attr"
        case Kind.CONST:
            return not _has_node(value)
        case Kind.ANYTHING:
            return True


def _has_node(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_node, value))
    return isinstance(value, fx.Node)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_scalar_weight(program: Program, node: fx.Node, expected: float) -> bool:
    if node.op != "get_attr" or node.meta["val"].dim() != 0:
        return False
    tensor = program.weights.materialize(str(node.target))
    if tensor.is_meta:
        return False
    return bool(tensor.item() == torch.tensor(expected, dtype=tensor.dtype).item())


def _describe(value: Any) -> str:
    """A part of a pattern, or of a program, as a person reads it, without a node's name."""
    match value:
        case Call():
            return value.label
        case Choice():
            return " or ".join(map(_describe, value.options))
        case Marked():
            return _describe(value.term)
        case Variable():
            return value.kind.value
        case fx.Node(op="get_attr"):
            return "a weight"
        case fx.Node(op="placeholder"):
            return "an input of the program"
        case fx.Node(op="output"):
            return "a result of the program"
        case fx.Node():
            return format_target(value.target)
        case list() | tuple():
            return f"[{', '.join(map(_describe, value))}]"
    return repr(value)


def _describe_place(where: _Where) -> str:
    if not where:
        return "output"
    outer, term, target, index = where
    known = schema_parameters(target)
    operand = known[index][0] if known is not None else f"operand {index}"
    return f"{operand} of {term.label}" + (f", {_describe_place(outer)}" if outer else "")
