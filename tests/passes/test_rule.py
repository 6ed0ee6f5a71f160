"""Rules: what patterns match, what they refuse and why, and what rewriting guarantees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tests.work import function_calls
from torch import Tensor, fx, nn

from qcompile.errors import QCompileError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.dialect import gated_act, rms_norm
from qcompile.ir.edit import Editor
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Port, Signature
from qcompile.ir.weights import TensorSpec, WeightStore
from qcompile.passes.infra import Context, PassManager, PassResult
from qcompile.passes.rule import (
    ANY,
    ApplyRules,
    Const,
    Match,
    Named,
    OneOf,
    Optional,
    Rewrite,
    Rule,
    RuleError,
    Shared,
    Weight,
)

aten = torch.ops.aten

WIDTH = 4


class Body(nn.Module):
    """A function of x ``[s0, 4]`` and of weights w, v ``[4, 4]``, b, g ``[4]``."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.empty(WIDTH, WIDTH)) for _ in range(2))
        self.b, self.g = (nn.Parameter(torch.empty(WIDTH)) for _ in range(2))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self)


def capture(function: Callable[..., Any]) -> Program:
    """The program of ``function(x, weights)``, with random weights."""
    with torch.device("meta"):
        program = capture_module(Body(function), torch.empty(3, WIDTH))
    generator = torch.Generator().manual_seed(0)
    for name in list(program.weights):
        shape = program.weights.spec(name).shape
        program.weights.put(name, torch.randn(shape, generator=generator))
    return program


def apply(program: Program, *rules: Rule) -> PassResult:
    """Applies rules to a program in place and checks that it is still well formed."""
    result = ApplyRules(rules).run(program, Context())
    program.tidy()
    program.verify(shapes=True)
    return result


def body(program: Program) -> str:
    """The text without its first line."""
    return program.text().split("\n", 1)[1]


def run(program: Program, x: Tensor) -> tuple[Tensor, ...]:
    return Interpreter(program, dtype=torch.float64).run(x)


class GatedAct(Rule):
    def pattern(self, gate: Tensor, up: Tensor) -> Any:
        return aten.silu(gate) * up

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        return edit.call(gated_act, match["gate"], match["up"], "silu")


class RmsNorm(Rule):
    def pattern(self, x: Tensor, gain: Weight, eps: Const) -> Any:
        mean = aten.mean(aten.pow(x, 2), [-1], True)
        return x * aten.rsqrt(mean + eps) * gain

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        return edit.call(rms_norm, match["x"], match["gain"], match["eps"])


class Drop(Rule):
    """Replaces what a pattern matches by its variable x."""

    def __init__(self, pattern: Callable[..., Any]) -> None:
        self._pattern = pattern

    def patterns(self) -> Sequence[Callable[..., Any]]:
        return (self._pattern,)

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        return match.node("x")


def matches(function: Callable[..., Any], pattern: Callable[..., Any]) -> bool:
    """Whether a pattern matches somewhere in a program."""
    return apply(capture(function), Drop(pattern)).modified


# --- What patterns match ---


def test_operators_become_one() -> None:
    program = capture(lambda x, m: nn.functional.silu(x @ m.w) * (x @ m.v))
    before = run(program, torch.ones(2, WIDTH))
    result = apply(program, GatedAct())
    assert body(program) == (
        "  %0: f32[s0, 4] = aten.matmul(%x, @w)\n"
        "  %1: f32[s0, 4] = aten.matmul(%x, @v)\n"
        "  %2: f32[s0, 4] = qc.gated_act(%0, %1, silu)\n"
        "  return %2\n"
    )
    assert result.rewrites == 1
    assert result.details == [{"rule": "gated_act", "rewrites": 1}]
    torch.testing.assert_close(run(program, torch.ones(2, WIDTH)), before)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, m: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * m.g,
        lambda x, m: torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * x * m.g,
        lambda x, m: m.g * (x * torch.rsqrt(1e-5 + x.pow(2).mean(-1, True))),
    ],
    ids=["as in the pattern", "operands swapped", "gain first"],
)
def test_commutative_operands_match_in_either_order(function: Callable[..., Any]) -> None:
    program = capture(function)
    apply(program, RmsNorm())
    assert body(program) == "  %0: f32[s0, 4] = qc.rms_norm(%x, @g, 1e-05)\n  return %0\n"


def test_sum_with_alpha_is_not_commutative() -> None:
    def pattern(x: Tensor, w: Tensor) -> Any:
        return aten.add(aten.silu(w), x, alpha=2)

    assert matches(lambda x, m: torch.add(nn.functional.silu(x), x, alpha=2), pattern)
    assert not matches(lambda x, m: torch.add(x, nn.functional.silu(x), alpha=2), pattern)


def test_same_variable_twice_is_the_same_node() -> None:
    def pattern(x: Tensor) -> Any:
        return aten.sigmoid(x) * x

    assert matches(lambda x, m: torch.sigmoid(x) * x, pattern)
    (skip,) = apply(capture(lambda x, m: torch.sigmoid(x) * m.g), Drop(pattern)).skips
    assert skip.reason == "drop: other of aten.mul: a weight 'g' is not what 'x' is elsewhere"


@pytest.mark.parametrize("bias", [True, False])
def test_optional_operand_binds_none_when_absent(bias: bool) -> None:
    seen = []

    class Linear(Rule):
        def pattern(self, x: Tensor, weight: Weight, bias: Weight | None) -> Any:
            return aten.linear(aten.relu(x), weight, bias)

        def check(self, match: Match) -> str:
            seen.append(match["bias"])
            return "seen"

        def rewrite(self, match: Match, edit: Editor) -> fx.Node:
            raise NotImplementedError

    program = capture(lambda x, m: nn.functional.linear(x.relu(), m.w, m.b if bias else None))
    apply(program, Linear())
    assert [getattr(node, "target", None) for node in seen] == ["b" if bias else None]


def test_omitted_argument_must_have_its_default() -> None:
    def pattern(x: Tensor, w: Weight) -> Any:
        return aten.linear(x, w)

    assert matches(lambda x, m: nn.functional.linear(x, m.w), pattern)
    assert not matches(lambda x, m: nn.functional.linear(x, m.w, m.b), pattern)


@pytest.mark.parametrize("wrapped", [Optional(aten.neg), lambda t: Optional(aten.neg(t))])
def test_optional_operator_may_be_absent(wrapped: Callable[..., Any]) -> None:
    def pattern(x: Tensor) -> Any:
        return aten.silu(wrapped(aten.relu(x)))

    assert matches(lambda x, m: nn.functional.silu(-x.relu()), pattern)
    assert matches(lambda x, m: nn.functional.silu(x.relu()), pattern)
    assert not matches(lambda x, m: nn.functional.silu(x.relu().exp()), pattern)


def test_one_of_matches_each_alternative() -> None:
    def pattern(x: Tensor) -> Any:
        return OneOf(aten.silu, aten.tanh)(OneOf(aten.relu(x), aten.mul(x, OneOf(0.5, 0.25))))

    assert matches(lambda x, m: torch.tanh(x.relu()), pattern)
    assert matches(lambda x, m: nn.functional.silu(x * 0.25), pattern)
    assert not matches(lambda x, m: nn.functional.silu(x * 0.75), pattern)
    assert not matches(lambda x, m: torch.exp(x.relu()), pattern)


def test_rule_may_give_several_patterns() -> None:
    class Activations(Drop):
        def __init__(self) -> None:
            pass

        def patterns(self) -> Sequence[Callable[..., Any]]:
            return (self.plain, self.doubled)

        def plain(self, x: Tensor) -> Any:
            return aten.relu(x)

        def doubled(self, x: Tensor) -> Any:
            return aten.mul(x, 2)

    program = capture(lambda x, m: (x * 2).relu().exp())
    assert apply(program, Activations()).rewrites == 2
    assert body(program) == "  %0: f32[s0, s1] = aten.exp(%x)\n  return %0\n"


def test_packet_matches_any_overload_and_overload_only_itself() -> None:
    def packets(x: Tensor) -> Any:
        return aten.add(aten.mean(x, [-1], True), x)

    assert matches(lambda x, m: x.mean(-1, True) + x, packets)
    assert matches(lambda x, m: x + 1.0, lambda x: aten.add.Tensor(x, 1.0))
    assert not matches(lambda x, m: x + 1.0, lambda x: aten.add.Scalar(x, 1.0))


@pytest.mark.parametrize(
    ("literal", "expected"), [(2, True), (2.0, True), (3, False), (True, False)]
)
def test_literal_number_matches_equal_numbers(literal: float, expected: bool) -> None:
    assert matches(lambda x, m: x.pow(2), lambda x: aten.pow(x, literal)) is expected


@pytest.mark.parametrize(("literal", "expected"), [(0.1, True), (0.2, False)])
def test_literal_number_matches_scalar_weight(literal: float, expected: bool) -> None:
    program = capture(lambda x, m: x * m.g)
    program.weights.put("scalar", torch.tensor(0.1))  # 0.1 is no float32, but rounds to this one
    edit = Editor(program)
    (call,) = program.calls(aten.mul.Tensor)
    with edit.before(call):
        call.args = (call.args[0], edit.weight("scalar"))
    assert apply(program, Drop(lambda x: aten.mul(x, literal))).modified is expected


def test_variables_bind_only_what_their_annotation_allows() -> None:
    def weight(x: Tensor, w: Weight) -> Any:
        return aten.sub(x, w)

    def constant(x: Tensor, c: Const) -> Any:
        return aten.sub(x, c)

    def tensor(x: Tensor, t: Tensor) -> Any:
        return aten.sub(x, t)

    def of_weight(x: Tensor, m: Body) -> Tensor:
        return x - m.g

    def of_number(x: Tensor, m: Body) -> Tensor:
        return x - 2.0

    def of_value(x: Tensor, m: Body) -> Tensor:
        return x - x.exp()

    found = [
        [matches(function, pattern) for function in (of_weight, of_number, of_value)]
        for pattern in (weight, constant, tensor)
    ]
    assert found == [[True, False, False], [False, True, False], [True, False, True]]


def test_wildcards_and_named_values_are_bound_by_name() -> None:
    seen: dict[str, Any] = {}

    class Reader(Rule):
        def pattern(self, x: Tensor) -> Any:
            return aten.mean(Named("square", aten.pow(x, ANY("power"))), ANY("dims"), ANY("keep"))

        def check(self, match: Match) -> str:
            seen.update(match.bindings)
            seen["shape"] = match.value("square").shape[1]
            return "seen"

        def rewrite(self, match: Match, edit: Editor) -> fx.Node:
            raise NotImplementedError

    apply(capture(lambda x, m: x.pow(3).mean(-1, True)), Reader())
    assert (seen["power"], seen["dims"], seen["keep"], seen["shape"]) == (3, [-1], True, WIDTH)
    assert seen["square"].target is aten.pow.Tensor_Scalar


def test_list_operands_and_getitem_match() -> None:
    def pattern(x: Tensor) -> Any:
        halves = aten.split(x, 2, -1)
        return aten.cat([halves[1], halves[0]], -1)

    program = capture(lambda x, m: torch.cat([x.split(2, -1)[1], x.split(2, -1)[0]], -1))
    calls = len(list(program.calls()))
    assert calls > 2
    # The captured program splits twice; the pattern wants one split, read twice.
    first, second = program.calls(aten.split.Tensor)
    second.replace_all_uses_with(first)
    program.tidy()
    assert apply(program, Drop(pattern)).rewrites == 1
    assert body(program) == "  return %x\n"


# --- Values used outside ---


def used_outside(x: Tensor, m: Body) -> tuple[Tensor, Tensor]:
    act = nn.functional.silu(x)
    return act * m.g, act.exp()


def test_inner_value_with_users_outside_does_not_match() -> None:
    program = capture(used_outside)
    result = apply(program, GatedAct())
    assert not result.modified
    (skip,) = result.skips
    assert skip.node == "mul"
    assert skip.reason == (
        "gated_act: aten.silu inside the match is also used outside it, by aten.exp 'exp'"
    )


def test_shared_value_may_have_users_outside_and_stays() -> None:
    class SharedGatedAct(GatedAct):
        def pattern(self, gate: Tensor, up: Tensor) -> Any:
            return Shared(aten.silu(gate)) * up

    program = capture(used_outside)
    apply(program, SharedGatedAct())
    assert body(program) == (
        "  %0: f32[s0, 4] = aten.silu(%x)\n"
        "  %1: f32[s0, 4] = qc.gated_act(%x, @g, silu)\n"
        "  %2: f32[s0, 4] = aten.exp(%0)\n"
        "  return %1, %2\n"
    )


def test_value_returned_by_the_program_counts_as_used() -> None:
    def function(x: Tensor, m: Body) -> tuple[Tensor, Tensor]:
        act = nn.functional.silu(x)
        return act, act * m.g

    (skip,) = apply(capture(function), GatedAct()).skips
    assert "by a result of the program" in skip.reason


# --- Several outputs ---


class MergeLinears(Rule):
    """linear(x, W1), linear(x, W2)   =>   both halves of linear(x, [W1; W2])"""

    def pattern(self, x: Tensor, first: Weight, second: Weight) -> tuple[Tensor, Tensor]:
        return aten.linear(x, first), aten.linear(x, second)

    def rewrite(self, match: Match, edit: Editor) -> tuple[fx.Node, ...]:
        names = (str(match["first"].target), str(match["second"].target))
        rows = [match.value(name).shape[0] for name in ("first", "second")]
        spec = TensorSpec((sum(rows), match.value("first").shape[1]), match.value("first").dtype)
        edit.program.weights.derive(
            "+".join(names), names, lambda a, b: torch.cat((a, b)), spec, exact=True, label="cat"
        )
        both = edit.call(aten.linear.default, match["x"], edit.weight("+".join(names)))
        return (
            edit.call(aten.slice.Tensor, both, -1, 0, rows[0]),
            edit.call(aten.slice.Tensor, both, -1, rows[0], sum(rows)),
        )


def test_several_outputs_are_replaced_at_once() -> None:
    def function(x: Tensor, m: Body) -> Tensor:
        return nn.functional.linear(x, m.w).exp() - nn.functional.linear(x, m.v)

    program = capture(function)
    x = torch.randn(2, WIDTH)
    before = run(program, x)
    assert apply(program, MergeLinears()).rewrites == 1
    assert body(program) == (
        "  %0: f32[s0, 8] = aten.linear(%x, @w+v)\n"
        "  %1: f32[s0, 4] = aten.slice(%0, -1, 0, 4)\n"
        "  %2: f32[s0, 4] = aten.slice(%0, -1, 4, 8)\n"
        "  %3: f32[s0, 4] = aten.exp(%1)\n"
        "  %4: f32[s0, 4] = aten.sub(%3, %2)\n"
        "  return %4\n"
    )
    torch.testing.assert_close(run(program, x), before, rtol=1e-12, atol=1e-12)


def test_weight_named_after_the_first_use_is_moved_before_it() -> None:
    def function(x: Tensor, m: Body) -> Tensor:
        return nn.functional.linear(x, m.w).exp() - nn.functional.linear(x, m.v)

    program = capture(function)
    last = list(program.calls(aten.linear.default))[-1]
    weight = last.args[1]
    assert isinstance(weight, fx.Node)
    last.prepend(weight)
    assert apply(program, MergeLinears()).rewrites == 1


class DualUse(Rule):
    """silu(x), x * up   =>   sigmoid(x) * x, up * x"""

    def pattern(self, x: Tensor, up: Tensor) -> Any:
        return aten.silu(x), aten.mul(x, up)

    def check(self, match: Match) -> str | None:
        return "done already" if match["up"].target is aten.sigmoid.default else None

    def rewrite(self, match: Match, edit: Editor) -> tuple[fx.Node, ...]:
        sigmoid = edit.call(aten.sigmoid.default, match["x"])
        return (
            edit.call(aten.mul.Tensor, sigmoid, match["x"]),
            edit.call(aten.mul.Tensor, match["up"], match["x"]),
        )


def test_input_computed_between_the_outputs_is_moved_up() -> None:
    def function(x: Tensor, m: Body) -> Tensor:
        first = nn.functional.silu(x).exp()
        return first - x * (x @ m.w)

    program = capture(function)
    x = torch.randn(2, WIDTH)
    before = run(program, x)
    assert apply(program, DualUse()).rewrites == 1
    torch.testing.assert_close(run(program, x), before, rtol=1e-12, atol=1e-12)


def test_input_computed_from_an_output_is_refused() -> None:
    program = capture(lambda x, m: x * (nn.functional.silu(x) @ m.w))
    result = apply(program, DualUse())
    assert not result.modified
    assert "must be computed before another input" in result.skips[0].reason


def test_missing_second_output_is_told() -> None:
    (skip,) = apply(capture(lambda x, m: nn.functional.silu(x)), DualUse()).skips
    assert skip.reason == "dual_use: no further aten.mul beside aten.silu 'silu'"


# --- Saying why not ---


def test_near_miss_names_the_place_and_what_was_found() -> None:
    result = apply(capture(lambda x, m: x.exp() * torch.rsqrt(x + 1e-5) * m.g), RmsNorm())
    (skip, *_) = result.skips
    assert skip.node == "mul_1"
    assert skip.reason == (
        "rms_norm: self of aten.add, self of aten.rsqrt, other of aten.mul, self of aten.mul: "
        "needs aten.mean, found an input of the program 'x'"
    )


def test_refusal_by_check_is_told_for_each_place() -> None:
    class Careful(Drop):
        def check(self, match: Match) -> str | None:
            if match.value("x").shape[-1] == WIDTH:
                return f"width {WIDTH} is reserved"
            return None

    result = apply(capture(lambda x, m: x.relu().exp().relu()), Careful(lambda x: aten.relu(x)))
    assert [(skip.node, skip.reason) for skip in result.skips] == [
        ("relu", "careful: width 4 is reserved"),
        ("relu_1", "careful: width 4 is reserved"),
    ]


def test_check_sees_the_other_order_before_a_match_is_given_up() -> None:
    class Second(Drop):
        def check(self, match: Match) -> str | None:
            return None if match["x"].op == "call_function" else "x is no call"

    program = capture(lambda x, m: m.g * x.exp())
    assert apply(program, Second(lambda x, y: x * y)).rewrites == 1
    assert body(program) == "  %0: f32[s0, 4] = aten.exp(%x)\n  return %0\n"


def test_equal_misses_are_told_once_with_their_number() -> None:
    def function(x: Tensor, m: Body) -> Tensor:
        for _ in range(5):
            x = x.exp() * m.g
        return x

    (skip,) = apply(capture(function), GatedAct()).skips
    assert skip.node == "mul"
    assert skip.reason == (
        "gated_act: self of aten.mul: needs aten.silu, found aten.exp 'exp' (and at 4 more)"
    )


def test_skips_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.passes.rule.MAX_SKIPS", 2)

    class Never(Drop):
        def check(self, match: Match) -> str | None:
            return "never"

    program = capture(lambda x, m: x.relu().relu().relu().relu())
    skips = apply(program, Never(lambda x: aten.relu(x))).skips
    assert [skip.reason for skip in skips] == ["never: never"] * 2 + ["2 more reasons are left out"]


def test_place_that_matched_in_the_end_is_no_skip() -> None:
    # The outer product matches only once the inner one has become a single operator.
    class Outer(Drop):
        pass

    program = capture(lambda x, m: (nn.functional.silu(x) * m.g).exp())
    outer = Outer(lambda x, y: aten.exp(torch.ops.qc.gated_act(x, y, "silu")))
    result = apply(program, outer, GatedAct())
    assert (result.rewrites, result.skips) == (2, [])
    assert body(program) == "  return %x\n"


# --- What rewriting guarantees ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda edit, x: edit.call(aten.to.dtype, x, torch.float64),
            r"rule 'wrong' replaces 'exp' \(aten.exp\), which is torch.float32\[s\d+, s\d+\], by "
            r"'to_dtype', which is torch.float64\[s\d+, s\d+\]",
        ),
        (
            lambda edit, x: edit.call(aten.sum.dim_IntList, x, [-1]),
            r"by 'sum_dim_int_list', which is torch.float32\[s\d+\]",
        ),
        (lambda edit, x: edit.graph.call_function(aten.exp.default, (x,)), "has no shape"),
        (lambda edit, x: (x, x), "gives 2 values at 'exp', its pattern has 1"),
        (lambda edit, x: edit.call(aten.mm.default, x, x), "rule 'wrong' failed at 'exp'"),
    ],
    ids=["dtype", "shape", "no shape", "count", "failing operator"],
)
def test_wrong_replacement_names_the_rule(build: Callable[..., Any], message: str) -> None:
    class Wrong(Rule):
        def pattern(self, x: Tensor) -> Any:
            return aten.exp(x)

        def rewrite(self, match: Match, edit: Editor) -> Any:
            return build(edit, match["x"])

    with pytest.raises(RuleError, match=message):
        apply(capture(lambda x, m: x.exp()), Wrong())


@pytest.mark.parametrize("grow", [False, True])
def test_rules_without_end_are_an_error(grow: bool) -> None:
    class Endless(Rule):
        def pattern(self, x: Tensor) -> Any:
            return aten.exp(x)

        def rewrite(self, match: Match, edit: Editor) -> fx.Node:
            inner = edit.call(aten.exp.default, match["x"]) if grow else match["x"]
            return edit.call(aten.exp.default, inner)

    with pytest.raises(RuleError, match="rule 'endless' still applies after") as caught:
        apply(capture(lambda x, m: x.exp()), Endless())
    assert caught.value.remedy is not None


def test_chain_is_rewritten_to_the_end() -> None:
    def function(x: Tensor, m: Body) -> Tensor:
        for _ in range(40):
            x = x * 0.5
        return x

    class Fold(Rule):
        def pattern(self, x: Tensor, a: Const, b: Const) -> Any:
            return x * a * b

        def rewrite(self, match: Match, edit: Editor) -> fx.Node:
            return edit.call(aten.mul.Tensor, match["x"], match["a"] * match["b"])

    program = capture(function)
    assert apply(program, Fold()).rewrites == 39
    assert body(program) == f"  %0: f32[s0, s1] = aten.mul(%x, {0.5**40:.9g})\n  return %0\n"


def test_dead_operands_do_not_hide_later_matches() -> None:
    # Once relu(act) * 0 is dropped, act has one user left, and the gate matches.
    program = capture(lambda x, m: (nn.functional.silu(x) * m.g) + m.b)
    (product,) = program.calls(aten.mul.Tensor)
    (act,) = program.calls(aten.silu.default)
    edit = Editor(program)
    (total,) = program.calls(aten.add.Tensor)
    with edit.before(total):
        nothing = edit.call(aten.mul.Tensor, edit.call(aten.relu.default, act), 0.0)
        total.args = (edit.call(aten.add.Tensor, product, nothing), total.args[1])
    result = apply(program, GatedAct(), Drop(lambda x, y: aten.add(x, aten.mul(y, 0.0))))
    assert result.rewrites == 2
    assert body(program).count("qc.gated_act") == 1


def test_pass_carries_its_name_and_facts() -> None:
    norms = ApplyRules([RmsNorm()], name="norms", requires=[Fact.CANONICAL], ensures=[Fact.RAISED])
    program = capture(lambda x, m: x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * m.g)
    manager = PassManager([norms])
    with pytest.raises(QCompileError, match=r"pass 'norms' .* needs a program that is canonical"):
        manager.run(program)
    program.facts |= {Fact.CANONICAL}
    after, (record,) = manager.run(program)
    assert after.facts == {Fact.CANONICAL, Fact.RAISED}
    assert (record.name, record.result.rewrites) == ("norms", 1)
    assert ApplyRules.requires == frozenset()


def test_subgraph_computes_what_the_region_did() -> None:
    regions = []

    class Reader(RmsNorm):
        def check(self, match: Match) -> str | None:
            regions.append(match)
            return "seen"

    def function(x: Tensor, m: Body) -> Tensor:
        x = x.exp()
        return (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * m.g).relu()

    program = capture(function)
    apply(program, Reader())
    (match,) = regions
    assert [node.name for node in match.inputs] == ["exp", "g"]
    graph = match.subgraph()
    graph.lint()
    x, g = torch.randn(2, WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    ports = tuple(Port(node.name) for node in match.inputs)
    alone = Program(graph, WeightStore(), Signature(ports, (Port("out"),)))
    alone.verify(shapes=True)
    (found,) = Interpreter(alone, dtype=torch.float64).run(x, g)
    torch.testing.assert_close(found, torch.ops.qc.rms_norm(x, g, 1e-5), rtol=1e-12, atol=1e-12)


def test_observer_gets_region_and_weights_before_and_after() -> None:
    seen: list[Rewrite] = []
    program = capture(
        lambda x, m: nn.functional.linear(x, m.w).exp() - nn.functional.linear(x, m.v)
    )
    ApplyRules([MergeLinears()], on_rewrite=seen.append).run(program, Context())
    (event,) = seen
    x = torch.randn(2, WIDTH, dtype=torch.float64)

    def values(graph: fx.Graph, weights: WeightStore) -> list[Tensor]:
        sources = [n.meta["source"] for n in graph.nodes if n.op == "placeholder"]
        return [
            weights.materialize(str(s.target), torch.float64) if s.op == "get_attr" else x
            for s in sources
        ]

    def evaluate(graph: fx.Graph, weights: WeightStore) -> Any:
        return fx.Interpreter(nn.Module(), graph=graph).run(*values(graph, weights))

    assert "w+v" not in event.weights
    before = evaluate(event.before, event.weights)
    after = evaluate(event.after, program.weights)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


# --- Patterns that make no sense ---


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda x: torch.rsqrt(x), "calls 'rsqrt', which is no operator of the IR"),
        (lambda x: x, "must return operators applied to its parameters"),
        (lambda x: Optional(aten.relu(x)), "must return operators applied to its parameters"),
        (lambda x: aten.relu(x) if x else x, "cannot branch"),
        (lambda x: aten.relu(Optional(x)), "Optional takes an operator applied to an operand"),
        (lambda x, y: (aten.relu(x), aten.relu(y)), "output 1 of the pattern shares nothing"),
    ],
)
def test_senseless_pattern_is_an_error(pattern: Callable[..., Any], message: str) -> None:
    with pytest.raises(RuleError, match=message):
        apply(capture(lambda x, m: x.relu()), Drop(pattern))


def test_unknown_annotation_is_an_error() -> None:
    def pattern(x: Tensor, eps: float) -> Any:
        return aten.add(x, eps)

    with pytest.raises(RuleError, match="parameter 'eps' of the pattern is annotated"):
        apply(capture(lambda x, m: x.relu()), Drop(pattern))


def test_rule_without_pattern_is_an_error() -> None:
    class Empty(Rule):
        def rewrite(self, match: Match, edit: Editor) -> fx.Node:
            raise NotImplementedError

    with pytest.raises(RuleError, match="rule 'empty' has no pattern"):
        apply(capture(lambda x, m: x.relu()), Empty())


# --- Cost ---


def repeated(program: Program, times: int) -> Program:
    """A program that feeds the result of a one-input program back into it."""
    (value,) = program.inputs
    graph = fx.Graph()
    copies = {value: graph.node_copy(value)}
    for _ in range(times):
        for node in list(program.graph.nodes)[:-1]:
            if node is not value:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[value] = copies[program.results[0]]
    graph.output((copies[value],))
    return Program(graph, program.weights, program.signature)


def test_work_grows_as_the_graph_does() -> None:
    """Up to half the size of a Llama with 32 layers, and 20 rules of which most fit nowhere."""

    def layer(x: Tensor, m: Body) -> Tensor:
        for _ in range(10):
            x = x + (nn.functional.silu(nn.functional.linear(x, m.w)) * x) * 0.5
        norm = x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * m.g
        return x + nn.functional.linear(norm, m.v, m.b)

    def work(layers: int) -> int:
        program = repeated(one, layers)
        return function_calls(lambda: ApplyRules(rules).run(program, Context()))

    one = capture(layer)
    idle = [Drop(lambda x, w: aten.linear(aten.tanh(x), w)) for _ in range(19)]
    rules = [*idle, RmsNorm()]
    assert ApplyRules(rules).run(repeated(one, 20), Context()).rewrites == 20
    few, twice, four_times = work(5), work(10), work(20)
    assert four_times - twice < 2.1 * (twice - few)
