"""Local rewrites: what a rule is, and the pass that applies rules until none fits.

A rule is a pattern, a check and a rewrite::

    class RaiseGatedAct(Rule):
        \"\"\"mul(silu(gate), up)   =>   qc.gated_act(gate, up, "silu")\"\"\"

        def pattern(self, gate: Tensor, up: Tensor) -> Any:
            return torch.ops.aten.silu(gate) * up

        def rewrite(self, match: Match, edit: Editor) -> fx.Node:
            return edit.call(torch.ops.qc.gated_act.default, match["gate"], match["up"], "silu")

`qcompile.passes.pattern` describes what patterns may contain.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, takewhile
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Fact
from qcompile.ir.weights import WeightStore
from qcompile.passes.infra import Context, Numerics, Pass, PassResult, Skip
from qcompile.passes.matching import Match, Matcher, Miss, placement, region
from qcompile.passes.pattern import (
    ANY,
    Const,
    Named,
    OneOf,
    Optional,
    Pattern,
    RuleError,
    Shared,
    Weight,
    trace_pattern,
)

__all__ = [
    "ANY",
    "ApplyRules",
    "Const",
    "Match",
    "Named",
    "OneOf",
    "Optional",
    "Rewrite",
    "Rule",
    "RuleError",
    "Shared",
    "Weight",
]

MAX_SWEEPS = 256
"""Sweeps over the graph before a set of rules counts as endless. Each carries a rewrite all the
way downstream, so more than a few are needed only to carry one upstream step by step."""

MAX_SKIPS = 100
"""Entries of `PassResult.skips` before the rest is only counted."""

MAX_ORDERS = 64
"""Ways to fit one pattern at one node (operands swapped, outputs permuted) that `check` is asked
about; patterns of the project have at most a handful."""


class Rule(ABC):
    """A local rewrite that keeps the function.

    Subclasses define `pattern` and `rewrite`, and `check` where a pattern says too little.
    """

    @property
    def name(self) -> str:
        """The class name in snake case."""
        return "".join(
            f"_{letter.lower()}" if letter.isupper() else letter for letter in type(self).__name__
        ).lstrip("_")

    def pattern(self, *variables: Any, **named: Any) -> Any:
        """What to look for: a function of its variables, as `qcompile.passes.pattern` describes.

        Its parameters are the variables. It returns an operator applied to them, or a tuple of
        such for a rule that replaces several values at once.
        """
        del variables, named
        raise RuleError(f"rule '{self.name}' has no pattern", remedy="define pattern or patterns")

    def patterns(self) -> Sequence[Callable[..., Any]]:
        """The alternatives, tried in order; `pattern` alone unless overridden."""
        return (self.pattern,)

    def check(self, match: Match) -> str | None:
        """Why the rule must not apply to a match, or None where it may.

        Shapes and dtypes are at hand as ``match.value("x").shape``.
        """
        del match
        return None

    @abstractmethod
    def rewrite(self, match: Match, edit: Editor) -> fx.Node | tuple[fx.Node, ...]:
        """Adds the replacement, and returns one node for each output of the pattern.

        New nodes go where `edit` stands, which is after all inputs of the match. A node that
        exists already may be returned. Nothing needs to be erased.
        """

    @cached_property
    def traced(self) -> tuple[Pattern, ...]:
        """The patterns, traced once."""
        return tuple(trace_pattern(function, self.name) for function in self.patterns())


@dataclass(frozen=True)
class Rewrite:
    """A rewrite that is about to take its place, with what is needed to run it before and after.

    Attributes:
        rule: The rule.
        match: Where; its nodes will no longer stand in the program.
        weights: The weights as they were before.
        before: The region before, one placeholder for each of ``match.inputs``.
        after: The region after, which begins with the same placeholders and may have more; see
            `qcompile.passes.matching.region`.
    """

    rule: Rule
    match: Match
    weights: WeightStore
    before: fx.Graph
    after: fx.Graph


class ApplyRules(Pass):
    """Applies rules in graph order until none fits any more.

    At each node the rules are tried in the order given. Where an operator fits the last one of a
    pattern but the rest does not, or a check refuses, the reason becomes a skip.

    Args:
        rules: The rules.
        name: The name of the pass.
        requires: Facts that must hold before.
        ensures: Facts that hold after.
        invalidates: Facts that may no longer hold after.
        numerics: What all the rules promise about results.
        on_rewrite: Told of every rewrite before it takes its place, as `Context.on_rewrite` is.
        report_misses: Whether places that almost fit become skips. Not for rules whose last
            operator is common: most sums are no bias.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        name: str | None = None,
        requires: Iterable[Fact] = (),
        ensures: Iterable[Fact] = (),
        invalidates: Iterable[Fact] = (),
        numerics: Numerics | None = None,
        on_rewrite: Callable[[Rewrite], None] | None = None,
        report_misses: bool = True,
    ) -> None:
        self.rules = tuple(rules)
        self._report_misses = report_misses
        self._name = name
        self._on_rewrite = on_rewrite
        # What other passes say of their class, these say of themselves.
        vars(self).update(
            requires=type(self).requires | frozenset(requires),
            ensures=type(self).ensures | frozenset(ensures),
            invalidates=type(self).invalidates | frozenset(invalidates),
            numerics=type(self).numerics if numerics is None else numerics,
        )

    @property
    def name(self) -> str:
        """The name given, else the class name in snake case."""
        return self._name or super().name

    def run(self, program: Program, context: Context) -> PassResult:
        """Edits `program` and says what was done.

        Raises:
            RuleError: If a rule cannot be traced, fails, gives a value of another dtype or shape
                than the one it replaces, or if the rules do not come to an end.
        """
        told = [tell for tell in (self._on_rewrite, context.on_rewrite) if tell is not None]
        run = _Run(self.rules, program, told)
        run.to_fixpoint()
        counts = [{"rule": rule.name, "rewrites": run.counts[rule]} for rule in self.rules]
        skips = _skips(run.refusals) if self._report_misses else []
        return PassResult(sum(run.counts.values()), skips, counts)


@dataclass(frozen=True)
class _Refusal:
    """A rule that did not apply at a node: the pattern missed, or `check` gave a reason."""

    rule: Rule
    node: fx.Node
    why: Miss | str

    @property
    def reason(self) -> str:
        why = self.why if isinstance(self.why, str) else self.why.reason
        return f"{self.rule.name}: {why}"

    @property
    def progress(self) -> float:
        """How much of the pattern fitted."""
        return math.inf if isinstance(self.why, str) else self.why.progress

    @property
    def kind(self) -> object:
        """Equal for refusals that are told once, with their number; those of `check` are not."""
        return (self.rule, self.node if isinstance(self.why, str) else self.why.kind)


@dataclass
class _Run:
    """The application of rules to one program."""

    rules: tuple[Rule, ...]
    program: Program
    told: Sequence[Callable[[Rewrite], None]]
    counts: dict[Rule, int] = field(default_factory=dict)
    refusals: list[_Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = dict.fromkeys(self.rules, 0)
        self.index: dict[Any, list[tuple[Rule, Pattern]]] = {}
        for rule in self.rules:
            for pattern in rule.traced:
                for target in pattern.anchors:
                    self.index.setdefault(target, []).append((rule, pattern))
        self.edit = Editor(self.program)
        self.erased: set[fx.Node] = set()

    def to_fixpoint(self) -> None:
        """Sweeps until no rule applies.

        Raises:
            RuleError: If the rules go on for too long.
        """
        limit = 4 * len(self.program.graph.nodes) + 100
        sweeps = 0
        while (last := self._sweep()) is not None:
            sweeps += 1
            if sweeps == MAX_SWEEPS or sum(self.counts.values()) > limit:
                self._refuse_to_go_on(last)

    def _refuse_to_go_on(self, rule: Rule) -> NoReturn:
        raise RuleError(
            f"rule '{rule.name}' still applies after {sum(self.counts.values())} rewrites",
            remedy="its result, or another rule's, fits its pattern again: refuse that in check",
        )

    def _sweep(self) -> Rule | None:
        """Tries every node once, in graph order; returns the last rule that applied."""
        self.refusals = []
        last = None
        for node in list(self.program.graph.nodes):
            if node.op != "call_function" or node in self.erased or not node.users:
                continue
            for rule, pattern in self.index.get(node.target, ()):
                if self._apply(rule, pattern, node):
                    last = rule
                    break
        return last

    def _apply(self, rule: Rule, pattern: Pattern, anchor: fx.Node) -> bool:
        matcher = Matcher(pattern, self.program)
        refused: str | None = None
        for match in islice(matcher.matches(anchor), MAX_ORDERS):
            reason = rule.check(match)
            if reason is None:
                self._rewrite(rule, match)
                return True
            refused = refused or reason
        if refused is not None:
            self.refusals.append(_Refusal(rule, anchor, refused))
        elif matcher.miss is not None:
            self.refusals.append(_Refusal(rule, anchor, matcher.miss))
        return False

    def _rewrite(self, rule: Rule, match: Match) -> None:
        place = placement(match)
        assert place is not None
        point, late = place
        for node in late:
            point.prepend(node)
        was = (match.subgraph(), self.program.weights.copy()) if self.told else None
        previous = point.prev
        with self.edit.before(point):
            replacements = _call_rewrite(rule, match, self.edit)
        _check_replacements(rule, match, replacements)
        if was is not None:
            before, weights = was
            after = region(match.inputs, replacements)
            for tell in self.told:
                tell(Rewrite(rule, match, weights, before, after))
        added = list(takewhile(lambda node: node is not point, _from(previous.next)))
        for old, new in zip(match.outputs, replacements, strict=True):
            if new is not old:
                old.replace_all_uses_with(new)
        self._erase_dead([*match.nodes, *match.inputs, *added])
        self.counts[rule] += 1

    def _erase_dead(self, nodes: Iterable[fx.Node]) -> None:
        """Erases nodes that nobody uses, and what only they used: it would hide later matches."""
        pending = sorted(nodes)
        while pending:
            node = pending.pop()
            if node in self.erased or node.users or node.op in ("placeholder", "output"):
                continue
            operands = node.all_input_nodes
            self.program.graph.erase_node(node)
            self.erased.add(node)
            pending += operands


def _from(node: fx.Node) -> Iterator[fx.Node]:
    while True:
        yield node
        node = node.next


def _call_rewrite(rule: Rule, match: Match, edit: Editor) -> tuple[fx.Node, ...]:
    try:
        result = rule.rewrite(match, edit)
    # What torch raises from shape rules, and Python from wrong arguments.
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise RuleError(
            f"rule '{rule.name}' failed at '{match.outputs[0].name}': {error}"
        ) from error
    replacements = result if isinstance(result, tuple) else (result,)
    if len(replacements) != len(match.outputs):
        raise RuleError(
            f"rule '{rule.name}' gives {len(replacements)} values at '{match.outputs[0].name}', "
            f"its pattern has {len(match.outputs)}"
        )
    return replacements


def _check_replacements(rule: Rule, match: Match, replacements: tuple[fx.Node, ...]) -> None:
    for old, new in zip(match.outputs, replacements, strict=True):
        if "val" not in new.meta:
            raise RuleError(
                f"rule '{rule.name}' gives '{new.name}', which has no shape",
                remedy="make nodes with the editor",
            )
        was, now = old.meta["val"], new.meta["val"]
        if not _same_type(was, now):
            raise RuleError(
                f"rule '{rule.name}' replaces '{old.name}' ({format_target(old.target)}), which "
                f"is {_describe(was)}, by '{new.name}', which is {_describe(now)}"
            )


def _same_type(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.dtype == other.dtype
            and one.dim() == other.dim()
            and all(
                statically_known_true(a == b) for a, b in zip(one.shape, other.shape, strict=True)
            )
        )
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same_type, one, other))
    return isinstance(one, (int, torch.SymInt)) == isinstance(other, (int, torch.SymInt))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__


def _skips(refusals: list[_Refusal]) -> list[Skip]:
    """One skip per kind of refusal, at the first place, with the number of others like it.

    What came closest to a match comes first.
    """
    kinds: dict[object, list[_Refusal]] = {}
    for refusal in sorted(refusals, key=lambda refusal: -refusal.progress):
        kinds.setdefault(refusal.kind, []).append(refusal)
    skips = []
    for first, *others in kinds.values():
        more = f" (and at {len(others)} more)" if others else ""
        skips.append(Skip(first.node.name, first.reason + more))
    if len(skips) > MAX_SKIPS:
        left_out = len(skips) - MAX_SKIPS
        skips = [*skips[:MAX_SKIPS], Skip("", f"{left_out} more reasons are left out")]
    return skips
