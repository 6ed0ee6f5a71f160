"""Patterns of rules: plain functions over operators, traced once into a tree of terms.

A pattern is written the way a model is::

    def pattern(self, x: Tensor, gain: Weight, weight: Weight, eps: Const) -> Any:
        return torch.ops.aten.linear(torch.ops.qc.rms_norm(x, gain, eps), weight)

Its parameters are variables, and their annotations say what they bind:

=====================  ==========================================================
``Tensor``, or none    any node that yields a tensor
`Weight`               a reference to an entry of the weight store
`Const`                a plain value: a number, a dtype, a list of dims, None
``... | None``         the same, or None where the operand is absent
=====================  ==========================================================

Inside, `ANY` is any argument, `Optional` an operator that may be absent, `OneOf` a choice,
`Shared` a value with users outside the match, `Named` a value to refer to by name. An operator is
given as an overload (``torch.ops.aten.add.Tensor``) or as a packet (``torch.ops.aten.add``: any of
its overloads); ``+ - * / @ **`` and indexing stand for the operators of ATen and for ``getitem``.
Arguments that are left out must have their default.
"""

from __future__ import annotations

import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Annotated, Any

import torch
from torch import Tensor

from qcompile.errors import EquivalenceError


class RuleError(EquivalenceError):
    """A rule is wrong in itself: it cannot be traced, does not end, or changes a value's type."""


class Kind(Enum):
    """What a variable of a pattern may bind."""

    TENSOR = "a tensor"
    WEIGHT = "a weight"
    CONST = "a plain value"
    ANYTHING = "anything"


Weight = Annotated[Tensor, Kind.WEIGHT]
"""Annotates a parameter of a pattern that binds a weight only."""

Const = Annotated[Any, Kind.CONST]
"""Annotates a parameter of a pattern that binds a plain value only."""


class Term:
    """A part of a pattern; operators applied to it make larger ones."""

    __iter__ = None  # unpacking would not end: any index makes a term

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Term:
        del types
        return Call(func, tuple(args), dict(kwargs or {}))

    def __bool__(self) -> bool:
        raise RuleError(
            "a pattern cannot branch on a value", remedy="use OneOf, or several patterns"
        )

    def __add__(self, other: Any) -> Term:
        return Call(torch.ops.aten.add, (self, other))

    def __radd__(self, other: Any) -> Term:
        return Call(torch.ops.aten.add, (self, other))

    def __sub__(self, other: Any) -> Term:
        return Call(torch.ops.aten.sub, (self, other))

    def __mul__(self, other: Any) -> Term:
        return Call(torch.ops.aten.mul, (self, other))

    def __rmul__(self, other: Any) -> Term:
        return Call(torch.ops.aten.mul, (self, other))

    def __truediv__(self, other: Any) -> Term:
        return Call(torch.ops.aten.div, (self, other))

    def __matmul__(self, other: Any) -> Term:
        return Call(torch.ops.aten.matmul, (self, other))

    def __pow__(self, other: Any) -> Term:
        return Call(torch.ops.aten.pow, (self, other))

    def __neg__(self) -> Term:
        return Call(torch.ops.aten.neg, (self,))

    def __getitem__(self, index: Any) -> Term:
        return Call(operator.getitem, (self, index))


@dataclass(frozen=True, eq=False)
class Variable(Term):
    """Binds an argument; the same name means the same argument.

    Attributes:
        name: Its name in the match; empty for a wildcard that nobody asks for.
        kind: What it may bind.
        optional: Whether it may bind None as well.
    """

    name: str
    kind: Kind
    optional: bool = False


@dataclass(frozen=True, eq=False)
class Call(Term):
    """Binds a call of an operator.

    Attributes:
        operator: An overload, a packet of overloads, or ``operator.getitem``.
        args: Terms, plain values, or lists of them.
        kwargs: The same, by name.
        targets: The call targets that fit.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    targets: frozenset[Any] = field(init=False)
    _arranged: dict[Any, tuple[Any, ...] | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", _targets(self.operator))

    @property
    def label(self) -> str:
        """The operator as written in the pattern, such as ``aten.add``."""
        name = getattr(self.operator, "__name__", "?")
        return f"py.{name}" if self.operator is operator.getitem else str(self.operator)

    def operands(self, target: Any) -> tuple[Any, ...] | None:
        """The operands in the order of the target's schema, or None if they do not fit it."""
        if target not in self._arranged:
            self._arranged[target] = arrange(target, self.args, self.kwargs)
        return self._arranged[target]


@dataclass(frozen=True, eq=False)
class Choice(Term):
    """Binds what the first fitting option binds."""

    options: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Marked(Term):
    """Binds what `term` binds, and says more about it.

    Attributes:
        term: The term itself.
        shared: Whether it may have users outside the match.
        name: Its name in the match, or empty.
    """

    term: Any
    shared: bool = False
    name: str = ""


def ANY(name: str = "") -> Any:
    """A wildcard: any argument, be it a node, a plain value, or a list of them.

    Args:
        name: Its name in the match; two wildcards of one name bind the same argument.
    """
    return Variable(name, Kind.ANYTHING)


def Optional(option: Any) -> Any:
    """An operator that may be absent, its first operand standing in its place.

    ``Optional(torch.ops.aten.neg(x))`` is a negation of x or x itself; given an operator, as in
    ``Optional(torch.ops.aten.neg)(x)``, it means the same.
    """
    if not isinstance(option, Term):
        return lambda *args, **kwargs: Optional(option(*args, **kwargs))
    call = _unmarked(option)
    if not isinstance(call, Call) or not call.args:
        raise RuleError("Optional takes an operator applied to an operand")
    return Choice((option, call.args[0]))


def OneOf(*options: Any) -> Any:
    """A choice, tried in order: of terms and plain values, or of functions still to be applied.

    ``OneOf(aten.silu(x), aten.gelu(x))`` and ``OneOf(aten.silu, aten.gelu)(x)`` mean the same.
    """
    if options and all(callable(option) for option in options):
        return lambda *args, **kwargs: Choice(tuple(f(*args, **kwargs) for f in options))
    return Choice(options)


def Shared(term: Any) -> Any:
    """A value inside the match that may also be used outside it, and then stays computed."""
    return Marked(term, shared=True)


def Named(name: str, term: Any) -> Any:
    """A value inside the match that the rule wants to refer to as ``match[name]``."""
    return Marked(term, name=name)


@dataclass(frozen=True)
class Pattern:
    """A traced pattern.

    Attributes:
        outputs: One term per value that is replaced; the first is the anchor.
        names: All names that a match binds.
        anchors: Call targets at which a match can begin.
    """

    outputs: tuple[Term, ...]
    names: tuple[str, ...]
    anchors: frozenset[Any]


def trace_pattern(function: Callable[..., Any], rule: str) -> Pattern:
    """Calls a pattern function on variables.

    Args:
        function: The function, bound if it is a method.
        rule: The rule's name, for errors.

    Raises:
        RuleError: If an annotation has no meaning, or what is returned is no pattern.
    """
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except NameError as error:
        raise RuleError(
            f"rule '{rule}': the annotations of its pattern cannot be read: {error}",
            remedy="import what they name, also at run time",
        ) from error
    variables = {name: _variable(name, p.annotation, rule) for name, p in parameters.items()}
    traced = function(**variables)
    outputs = traced if isinstance(traced, tuple) else (traced,)
    for output in outputs:
        if not isinstance(output, Term) or root_targets(output) is None:
            raise RuleError(
                f"rule '{rule}': a pattern must return operators applied to its parameters",
                remedy="return one call, a OneOf of calls, or a tuple of these",
            )
    _require_connection(outputs, rule)
    inside = [name_of(term) for output in outputs for term in subterms(output)]
    names = dict.fromkeys((*variables, *filter(None, inside)))
    anchors = root_targets(outputs[0])
    assert anchors is not None
    return Pattern(outputs, tuple(names), anchors)


def subterms(term: Any) -> Iterator[Term]:
    """A term and all terms in it, outermost first."""
    if isinstance(term, Term):
        yield term
    for child in _children(term):
        yield from subterms(child)


def root_targets(term: Any) -> frozenset[Any] | None:
    """The call targets that a term can bind, or None if it can bind something that is no call."""
    match term:
        case Call():
            return term.targets
        case Marked():
            return root_targets(term.term)
        case Choice():
            options = [root_targets(option) for option in term.options]
            known = [targets for targets in options if targets is not None]
            return frozenset().union(*known) if len(known) == len(options) else None
    return None


def depth(term: Any) -> int:
    """The largest number of calls between a term and what it reads."""
    below = max((depth(child) for child in _children(term)), default=0)
    return below + isinstance(term, Call)


def key_of(term: Term) -> Term | str:
    """What a term's binding is stored under: variables are the same when their names are."""
    return term.name if isinstance(term, Variable) and term.name else term


def name_of(term: Term) -> str:
    """The name that a term gives to what it binds, or an empty string."""
    return term.name if isinstance(term, (Variable, Marked)) else ""


def arrange(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Arguments in the order of a target's schema, defaults filled in; None if they do not fit."""
    known = schema_parameters(target)
    if known is None:
        return None if kwargs else tuple(args)
    if len(args) > len(known):
        return None
    values, used = list(args), 0
    for name, required, default in known[len(args) :]:
        if name in kwargs:
            values.append(kwargs[name])
            used += 1
        elif required:
            return None
        else:
            values.append(default)
    return tuple(values) if used == len(kwargs) else None


@cache
def schema_parameters(target: Any) -> tuple[tuple[str, bool, Any], ...] | None:
    """Name, whether it is required, and default of each parameter; None without a schema."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return tuple(
        (
            argument.name,
            not argument.has_default_value(),
            argument.default_value if argument.has_default_value() else None,
        )
        for argument in target._schema.arguments
    )


def _targets(target: Any) -> frozenset[Any]:
    if isinstance(target, torch._ops.OpOverload) or target is operator.getitem:
        return frozenset({target})
    if isinstance(target, torch._ops.OpOverloadPacket):
        names: list[str] = target.overloads()
        return frozenset(getattr(target, name) for name in names)
    name = getattr(target, "__name__", str(target))
    raise RuleError(
        f"a pattern calls '{name}', which is no operator of the IR",
        remedy=f"write it with torch.ops, such as torch.ops.aten.{name}",
    )


def _children(term: Any) -> Sequence[Any]:
    match term:
        case Call():
            return (*term.args, *term.kwargs.values())
        case Choice():
            return term.options
        case Marked():
            return (term.term,)
        case list() | tuple():
            return term
    return ()


def _unmarked(term: Any) -> Any:
    return _unmarked(term.term) if isinstance(term, Marked) else term


def _variable(name: str, annotation: Any, rule: str) -> Variable:
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        optional = len(options) < len(typing.get_args(annotation))
        annotation = options[0] if len(options) == 1 else annotation
    if annotation in (inspect.Parameter.empty, Tensor, Any):
        return Variable(name, Kind.TENSOR, optional)
    if typing.get_origin(annotation) is Annotated:
        kinds = [extra for extra in annotation.__metadata__ if isinstance(extra, Kind)]
        if kinds:
            return Variable(name, kinds[0], optional)
    raise RuleError(
        f"rule '{rule}': parameter '{name}' of the pattern is annotated {annotation!r}",
        remedy="annotate it Tensor, Weight or Const, with '| None' where it may be absent",
    )


def _require_connection(outputs: Sequence[Term], rule: str) -> None:
    """Later outputs are looked for among the users of what is bound, so they must share it."""
    seen: set[Term | str] = set()
    for position, output in enumerate(outputs):
        keys = {key_of(term) for term in subterms(output)}
        if position and not keys & seen:
            raise RuleError(
                f"rule '{rule}': output {position} of the pattern shares nothing with those before"
            )
        seen |= keys
