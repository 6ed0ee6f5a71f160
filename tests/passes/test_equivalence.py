"""Checked equivalence: broken passes are caught and named, right ones pass, memory is bounded."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.analysis.stages import stages
from qcompile.errors import EquivalenceError, RecipeError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.edit import Editor
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Port, Role, Signature
from qcompile.ir.weights import Source, TensorSpec, WeightStore
from qcompile.passes.canonicalize import canonicalize_phase
from qcompile.passes.equivalence import (
    LocalChecker,
    LockstepChecker,
    checks_for,
    lockstep,
    prove_locally,
)
from qcompile.passes.infra import (
    Context,
    Equivalent,
    Exact,
    Lossy,
    Numerics,
    Pass,
    PassManager,
    PassResult,
    Phase,
    PhaseCheck,
)
from qcompile.passes.rule import ApplyRules, Const, Match, Rule, Weight
from qcompile.report import CompileReport

aten = torch.ops.aten

WIDTH, VOCABULARY, LAYERS = 8, 20, 3


class Block(nn.Module):
    """Causal attention over a cache, then a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("query", "key", "value", "out", "gate", "up", "down"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(
        self, x: Tensor, allowed: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = torch.cat((past_key, self.key(x).unsqueeze(1)), 2)
        value = torch.cat((past_value, self.value(x).unsqueeze(1)), 2)
        scores = self.query(x).unsqueeze(1) @ key.transpose(2, 3) * 0.35
        weights = torch.softmax(scores.masked_fill(~allowed, -1e30), -1)
        x = x + self.out((weights @ value).squeeze(1))
        x = x + self.down(torch.sigmoid(self.gate(x)) * self.up(x)) * 0.5
        return x, key, value


class Decoder(nn.Module):
    """A language model with left padding and a cache, no larger than needed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: tuple[Tensor, ...]) -> Any:
        total, query = attention_mask.shape[1], input_ids.shape[1]
        positions = torch.arange(query) + (total - query)
        causal = torch.arange(total) <= positions[:, None]
        allowed = causal & (attention_mask != 0)[:, None, None, :]
        x, present = self.embed(input_ids), []
        for i, block in enumerate(self.blocks):
            x, key, value = block(x, allowed, past[2 * i], past[2 * i + 1])
            present += [key, value]
        return (self.head(x), *present)


@cache
def _decoder() -> Program:
    torch.manual_seed(0)
    batch, query, past = 2, 3, 4
    inputs = (
        torch.zeros(batch, query, dtype=torch.int64),
        torch.ones(batch, past + query, dtype=torch.int64),
        tuple(torch.randn(batch, 1, past, WIDTH) for _ in range(2 * LAYERS)),
    )
    program = capture_module(Decoder(), inputs)

    def ports(key: Role, value: Role) -> list[Port]:
        roles = (key, value)
        return [Port(f"{role.value}.{i}", role, i) for i in range(LAYERS) for role in roles]

    signature = Signature(
        (
            Port("input_ids", Role.INPUT_IDS),
            Port("attention_mask", Role.ATTENTION_MASK),
            *ports(Role.PAST_KEY, Role.PAST_VALUE),
        ),
        (Port("logits", Role.LOGITS), *ports(Role.PRESENT_KEY, Role.PRESENT_VALUE)),
    )
    captured = replace(program, signature=signature)
    return PassManager([canonicalize_phase()]).run(captured)[0]


@pytest.fixture
def decoder() -> Program:
    return _decoder().copy()


class Edit(Pass):
    """A pass that applies a function, and promises what it is told to."""

    def __init__(
        self,
        function: Callable[[Program, Editor], object],
        numerics: Numerics | None = None,
        name: str = "edit",
    ) -> None:
        self._function = function
        self._name = name
        vars(self).update(numerics=numerics or Equivalent())

    @property
    def name(self) -> str:
        return self._name

    def run(self, program: Program, context: Context) -> PassResult:
        self._function(program, Editor(program))
        return PassResult(rewrites=1)


def _scales(program: Program) -> list[fx.Node]:
    """The products with a number, in order: two in each block."""
    return [n for n in program.calls(aten.mul.Tensor) if isinstance(n.args[1], float)]


def _scale_by(factor: float, which: int = 1) -> Callable[[Program, Editor], object]:
    def edit(program: Program, editor: Editor) -> None:
        node = _scales(program)[which]
        node.update_arg(1, node.args[1] * factor)  # type: ignore[operator]

    return edit


def _drop_bias(program: Program, editor: Editor) -> None:
    """Forgets the bias of the value projection of the second block."""
    node = list(program.calls(aten.linear.default))[7 + 1]
    node.args = node.args[:2]


def _swap_gate_and_up(program: Program, editor: Editor) -> None:
    """sigmoid(gate) * up  =>  sigmoid(up) * gate, in the last block."""
    sigmoid = list(program.calls(aten.sigmoid.default))[-1]
    (product,) = sigmoid.users
    (up,) = (operand for operand in product.args if operand is not sigmoid)
    product.args = (sigmoid.args[0], sigmoid)
    sigmoid.args = (up,)
    product.prepend(sigmoid)


def _move_scale_into_weight(program: Program, editor: Editor) -> None:
    """linear(x, W, b) * c  =>  linear(x, c * W, c * b): every block, through new weights."""
    for node in _scales(program):
        linear = node.args[0]
        if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
            continue
        factor = node.args[1]
        scaled = []
        for operand in linear.args[1:]:
            assert isinstance(operand, fx.Node)
            name = str(operand.target)
            program.weights.derive(
                f"{name}.scaled",
                (name,),
                lambda weight, factor=factor: weight * factor,
                program.weights.spec(name),
                exact=False,
                label="scale",
            )
            with editor.before(linear):
                scaled.append(editor.weight(f"{name}.scaled"))
        with editor.before(node):
            editor.replace(node, editor.call(aten.linear.default, linear.args[0], *scaled))


def _commute(program: Program, editor: Editor) -> None:
    """sigmoid(gate) * up  =>  up * sigmoid(gate), as a new node."""
    for sigmoid in program.calls(aten.sigmoid.default):
        (node,) = sigmoid.users
        with editor.before(node):
            editor.replace(node, editor.call(aten.mul.Tensor, *node.args[::-1]))


def _forget_past_in_positions(program: Program, editor: Editor) -> None:
    """arange(query) + past  =>  arange(query): right as long as there is no past."""
    add = next(
        node
        for node in program.calls(aten.add.Tensor)
        if isinstance(node.args[1], fx.Node) and not isinstance(node.args[1].meta["val"], Tensor)
    )
    add.update_arg(1, 0)


def _zero_padding(program: Program, editor: Editor) -> None:
    """Zeroes what nobody looks at: the embeddings of padding."""
    (embedding,) = program.calls(aten.embedding.default)
    ids, mask = program.inputs[:2]
    users = list(embedding.users)
    with editor.before(users[0]):
        query = editor.call(aten.sym_size.int, ids, 1)
        start = editor.call(operator.neg, query)
        recent = editor.call(aten.slice.Tensor, mask, 1, start, 2**62)
        zeroed = editor.call(
            aten.mul.Tensor, embedding, editor.call(aten.unsqueeze.default, recent, 2)
        )
    for user in users:
        user.replace_input_with(embedding, zeroed)


def _rotate_residual(program: Program, editor: Editor) -> None:
    """Permutes the residual stream: what writes to it, and what reads from it."""
    order = torch.arange(WIDTH - 1, -1, -1)

    def permute(node: fx.Node, axis: int) -> None:
        name = str(node.target)
        program.weights.derive(
            name,
            (name,),
            lambda weight: weight.index_select(axis, order),
            program.weights.spec(name),
            exact=True,
            label="permute",
        )

    for node in program.calls(aten.embedding.default):
        permute(node.args[0], 1)  # type: ignore[arg-type]
    linears = list(program.calls(aten.linear.default))
    for i, linear in enumerate(linears):
        writes = i < 7 * LAYERS and i % 7 in (3, 6)
        if writes:
            permute(linear.args[1], 0)  # type: ignore[arg-type]
            permute(linear.args[2], 0)  # type: ignore[arg-type]
        elif i == 7 * LAYERS or i % 7 in (0, 1, 2, 4, 5):
            permute(linear.args[1], 1)  # type: ignore[arg-type]


def _run(program: Program, *passes: Pass, level: Any = "full") -> tuple[Program, Context]:
    context = Context(checks=checks_for(level))
    after, _ = PassManager([Phase("phase", passes)]).run(program, context)
    return after, context


@pytest.mark.parametrize("level", ["full", "local"])
@pytest.mark.parametrize(
    ("edit", "node"),
    [
        (_scale_by(1.01, which=3), "mul_5"),
        (_drop_bias, "linear_8"),
        (_swap_gate_and_up, "sigmoid_2"),
    ],
    ids=["constant", "bias", "operands"],
)
def test_broken_pass_is_named_with_the_node_and_rolled_back(
    decoder: Program, edit: Callable[[Program, Editor], object], node: str, level: str
) -> None:
    before = decoder.text()
    names = {n.name for n in decoder.graph.nodes}
    with pytest.raises(EquivalenceError, match="pass 'breaks'") as caught:
        _run(decoder, Edit(_commute), Edit(edit, name="breaks"), level=level)
    assert decoder.text() == before
    found = caught.value.message.split("node '")[1].split("'")[0]
    assert found in names
    assert found == node


def test_broken_pass_leaves_the_program_of_the_pass_before(decoder: Program) -> None:
    seen: list[Program] = []
    manager = PassManager(
        [Phase("good", (Edit(_commute),)), Phase("bad", (Edit(_scale_by(2.0)),))],
        checker=LocalChecker(),
        on_phase=lambda _, program: seen.append(program),
    )
    with pytest.raises(EquivalenceError):
        manager.run(decoder)
    (last_good,) = seen
    assert lockstep(decoder, last_good) is not None


@pytest.mark.parametrize("edit", [_commute, _move_scale_into_weight], ids=["commute", "fold"])
def test_right_rewrites_are_proved_where_they_happen(
    decoder: Program, edit: Callable[[Program, Editor], object]
) -> None:
    after = decoder.copy()
    edit(after, Editor(after))
    after.tidy()
    proof = prove_locally(decoder, after, tolerance=1e-10)
    assert proof.unproved is None
    # A first place and a sample: not all the layers.
    assert 1 <= proof.regions <= 2
    assert proof.error <= 1e-15


def test_unchanged_program_needs_no_region(decoder: Program) -> None:
    proof = prove_locally(decoder, decoder.copy(), tolerance=0.0)
    assert (proof.unproved, proof.regions, proof.error) == (None, 0, 0.0)


@pytest.mark.parametrize(
    ("factor", "numerics", "holds"),
    [
        (1 + 1e-12, Equivalent(), True),
        (1 + 1e-8, Equivalent(), False),
        (1 + 1e-8, Equivalent(tolerance=1e-6), True),
        (1 + 2**-52, Exact(), False),
        (1.0, Exact(), True),
    ],
)
def test_tolerance_is_what_the_pass_promises(
    decoder: Program, factor: float, numerics: Numerics, holds: bool
) -> None:
    item = Edit(_scale_by(factor), numerics)
    if holds:
        _, context = _run(decoder, item)
        (record,) = context.phases[0].passes
        assert record.error is not None
        assert record.error <= 2 * abs(factor - 1)
    else:
        with pytest.raises(EquivalenceError, match="relative difference"):
            _run(decoder, item)


def test_pass_that_forgets_the_past_is_caught_by_the_second_call(decoder: Program) -> None:
    after = decoder.copy()
    _forget_past_in_positions(after, Editor(after))
    after.tidy()
    with pytest.raises(EquivalenceError, match="over a past of 4 tokens"):
        lockstep(decoder, after)
    # It is the first call that would have let it through.
    ids = torch.arange(10).reshape(2, 5)
    cache = tuple(torch.empty(2, 1, 0, WIDTH) for _ in range(2 * LAYERS))
    logits = [_logits(program, ids, cache) for program in (decoder, after)]
    assert torch.equal(*logits)


def _logits(program: Program, ids: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
    return Interpreter(program).run(ids, torch.ones_like(ids), *cache)[0]


def test_values_of_padding_may_change(decoder: Program) -> None:
    _, context = _run(decoder, Edit(_zero_padding))
    check = context.phases[0].check
    assert check is not None
    assert check.error == 0.0


def test_value_of_a_token_may_not_change_where_padding_may(decoder: Program) -> None:
    def zero_all(program: Program, editor: Editor) -> None:
        _zero_padding(program, editor)
        (recent,) = program.calls(aten.slice.Tensor)
        with editor.after(recent):
            nothing = editor.call(aten.mul.Tensor, recent, 0)
        recent.replace_all_uses_with(nothing)
        nothing.update_arg(0, recent)

    with pytest.raises(EquivalenceError):
        _run(decoder, Edit(zero_all))


def test_rotated_residual_stream_is_judged_by_what_is_returned(decoder: Program) -> None:
    after, context = _run(decoder, Edit(_rotate_residual))
    check = context.phases[0].check
    assert check is not None
    assert check.error is not None
    assert check.error <= 1e-14
    agreement = lockstep(decoder, after)
    assert agreement is not None
    assert agreement.boundary_error is not None
    assert agreement.boundary_error > 0.1


def test_boundary_values_are_compared_through_the_transform_given(decoder: Program) -> None:
    after = decoder.copy()
    _rotate_residual(after, Editor(after))
    boundaries = [s.boundary.name for s in stages(decoder) if s.boundary is not None]
    assert len(boundaries) == LAYERS + 1
    right = dict.fromkeys(boundaries, lambda x: x.flip(-1))
    agreement = lockstep(decoder, after, through=right)
    assert agreement is not None
    assert agreement.boundary_error is not None
    assert agreement.boundary_error <= 1e-14
    with pytest.raises(EquivalenceError, match=boundaries[1]):
        lockstep(decoder, after, through={boundaries[1]: lambda x: x})


def test_failing_phase_is_bisected_to_its_pass(decoder: Program) -> None:
    passes = (
        Edit(_commute, name="good"),
        Edit(_drop_bias, name="bad"),
        Edit(_move_scale_into_weight, name="also_good"),
    )
    manager = PassManager([Phase("three", passes)], span_checker=LockstepChecker())
    with pytest.raises(EquivalenceError, match=r"pass 'bad' \(phase 'three'\): node 'linear_8'"):
        manager.run(decoder)


def test_phases_in_a_row_are_compared_once_and_the_pass_is_still_named(decoder: Program) -> None:
    good = Phase("good", (Edit(_commute), Edit(_move_scale_into_weight)))
    asked: list[int] = []

    def check(before: Program, after: Program, passes: Sequence[Pass]) -> PhaseCheck:
        asked.append(len(passes))
        return LockstepChecker()(before, after, passes)

    context = Context()
    PassManager([good, Phase("idle", ()), good], span_checker=check).run(decoder, context)
    assert asked == [4]
    first, idle, last = (record.check for record in context.phases)
    assert first is not None
    assert first.skipped == "compared together with 'good'"
    assert idle is None
    assert last is not None
    assert last.error is not None
    assert last.error <= 1e-14
    bad = Phase("bad", (Edit(_drop_bias, name="breaks"),))
    with pytest.raises(EquivalenceError, match=r"pass 'breaks' \(phase 'bad'\): node 'linear_8'"):
        PassManager([good, bad, good], span_checker=check).run(decoder)
    # Together, then one by one up to the broken one.
    assert asked == [4, 5, 1, 1, 1]


def test_phase_that_rounds_divides_what_is_compared(decoder: Program) -> None:
    seen: list[tuple[str, ...]] = []

    def check(before: Program, after: Program, passes: Sequence[Pass]) -> PhaseCheck:
        seen.append(tuple(item.name for item in passes))
        return PhaseCheck(None, 0)

    phases = [
        Phase("one", (Edit(_commute, name="one"),)),
        Phase("round", (Edit(_drop_bias, Lossy(), name="round"),)),
        Phase("two", (Edit(_commute, name="two"),)),
    ]
    PassManager(phases, span_checker=check).run(decoder)
    assert seen == [("one",), ("round",), ("two",)]


class ForgetBias(Rule):
    """``linear(x, W, b) * 0.5``  =>  ``linear(x, W / 2, b / 2)``, wrong where it should matter."""

    def __init__(self, wrong_at: str) -> None:
        self._wrong_at = wrong_at

    def pattern(self, x: Tensor, w: Weight, b: Weight, factor: Const) -> Any:
        return aten.linear(x, w, b) * factor

    def rewrite(self, match: Match, edit: Editor) -> fx.Node:
        factor, weights, scaled = match["factor"], edit.program.weights, []
        wrong = str(match["w"].target) == self._wrong_at
        for node in (match["w"], match["b"]):
            name = str(node.target)
            by = 1.0 if wrong and node is match["b"] else factor
            spec = weights.spec(name)
            scale = lambda value, by=by: value * by  # noqa: E731
            weights.derive(name, (name,), scale, spec, exact=False, label="scale")
            scaled.append(edit.weight(name))
        return edit.call(aten.linear.default, match["x"], *scaled)


@pytest.mark.parametrize(
    "how",
    [{"checker": LocalChecker()}, {"span_checker": LockstepChecker()}],
    ids=["pass", "span"],
)
def test_broken_rule_is_named_with_the_place_of_its_wrong_rewrite(
    decoder: Program, how: dict[str, Any]
) -> None:
    place = [n for n in _scales(decoder) if n.args[0].target is aten.linear.default][1]  # type: ignore[union-attr]
    (weight,) = (str(n.target) for n in place.args[0].args[1:2])  # type: ignore[union-attr]
    broken = ApplyRules([ForgetBias(wrong_at=weight)], name="fold_scales")
    with pytest.raises(EquivalenceError, match=rf"rule 'forget_bias' at '{place.name}': node"):
        PassManager([broken], **how).run(decoder)
    right = ApplyRules([ForgetBias(wrong_at="nowhere")], name="fold_scales")
    _, (record,) = PassManager([right], **how).run(decoder)
    assert record.result.rewrites == LAYERS


def test_lossy_passes_are_not_checked(decoder: Program) -> None:
    _, context = _run(decoder, Edit(_drop_bias, Lossy()))
    (phase,) = context.phases
    assert phase.passes[0].error is None
    assert phase.check is not None
    assert phase.check.error is None
    assert phase.check.skipped == "it rounds on purpose"


def test_another_number_of_results_is_no_equivalence(decoder: Program) -> None:
    after = decoder.copy()
    after.output_node.args = (tuple(after.results[:-1]),)
    after.signature = replace(after.signature, outputs=after.signature.outputs[:-1])
    with pytest.raises(EquivalenceError, match="returns 6 values, it returned 7"):
        lockstep(decoder, after)


def test_another_input_is_no_equivalence(decoder: Program) -> None:
    def add_input(program: Program, editor: Editor) -> None:
        with editor.after(program.inputs[-1]):
            extra = program.graph.placeholder("extra")
        extra.meta["val"] = program.inputs[0].meta["val"]
        inputs = (*program.signature.inputs, Port("extra"))
        program.signature = replace(program.signature, inputs=inputs)

    with pytest.raises(EquivalenceError, match="an input 'extra' that it did not have before"):
        _run(decoder, Edit(add_input))


def test_pass_that_leaves_a_node_that_cannot_run_is_caught(decoder: Program) -> None:
    def misuse(program: Program, editor: Editor) -> None:
        (embedding,) = program.calls(aten.embedding.default)
        embedding.target = aten.index_select.default

    with pytest.raises(EquivalenceError, match=r"node 'embedding' .* cannot run"):
        _run(decoder, Edit(misuse))


def test_images_are_checked_with_sizes_that_the_model_takes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 4, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    program = capture_module(model, torch.randn(2, 3, 16, 16))

    def drop_relu(program: Program, editor: Editor) -> None:
        (relu,) = program.calls(aten.relu.default)
        relu.replace_all_uses_with(relu.all_input_nodes[0])

    agreement = lockstep(program, program.copy())
    assert agreement is not None
    assert agreement.error == 0.0
    with pytest.raises(EquivalenceError, match="pass 'edit'"):
        _run(program, Edit(drop_relu))


@pytest.mark.parametrize(
    ("level", "passes", "phases"), [("full", True, True), ("local", True, False)]
)
def test_levels_say_what_is_checked(level: Any, passes: bool, phases: bool) -> None:
    checks = checks_for(level)
    assert (checks.each_pass is not None, checks.each_span is not None) == (passes, phases)


def test_structure_alone_is_checked_when_checks_are_off(decoder: Program) -> None:
    after, context = _run(decoder, Edit(_drop_bias), level="off")
    assert context.phases[0].check is None
    assert context.phases[0].passes[0].error is None
    with pytest.raises(EquivalenceError):
        lockstep(decoder, after)


def test_unknown_level_is_refused() -> None:
    unknown: Any = "some"
    with pytest.raises(RecipeError, match="no check 'some'") as caught:
        checks_for(unknown)
    assert caught.value.remedy == "use one of full, local, off"


def test_report_has_errors_and_seconds_of_passes_and_phases(decoder: Program) -> None:
    _, context = _run(decoder, Edit(_move_scale_into_weight))
    document = CompileReport(phases=context.phases).to_dict()
    (phase,) = document["checks"]["phases"]
    (record,) = document["passes"]
    assert phase["phase"] == "phase"
    assert phase["relative_error"] <= 1e-14
    assert phase["peak_weight_bytes"] > 0
    assert record["relative_error"] <= 1e-14
    spent = record["check_seconds"] + phase["seconds"]
    assert document["checks"]["seconds"] == pytest.approx(spent, abs=2e-3)


class CountProducts(TorchDispatchMode):
    """Counts the products with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func in (aten.addmm.default, aten.mm.default, aten.linear.default)
        return func(*args, **(kwargs or {}))


def test_product_that_both_programs_compute_is_computed_once(decoder: Program) -> None:
    after = decoder.copy()
    _scale_by(1 + 1e-13, which=-1)(after, Editor(after))
    linears = len(list(decoder.calls(aten.linear.default)))
    cases = 2
    with CountProducts() as alone:
        lockstep(decoder, decoder.copy())
    assert alone.count == cases * linears
    # After the last block, activations differ in their last bits: the head is computed twice.
    with CountProducts() as changed:
        agreement = lockstep(decoder, after)
    assert changed.count == cases * (linears + 1)
    assert agreement is not None
    assert 0 < agreement.error <= 1e-12


class Generated:
    """A checkpoint of any size that takes no room: tensors are made when they are read."""

    identity = "generated"

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        self._specs = specs

    def specs(self) -> dict[str, TensorSpec]:
        return self._specs

    def read(self, name: str) -> Tensor:
        spec = self._specs[name]
        return torch.randn(spec.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05

    def fingerprint(self) -> str:
        return ""


class LlamaShape(nn.Module):
    """The shapes of an 8 B Llama, every width divided by 32."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(4008, 128)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query": nn.Linear(128, 128),
                    "value": nn.Linear(128, 32),
                    "out": nn.Linear(32, 128),
                    "gate": nn.Linear(128, 448),
                    "up": nn.Linear(128, 448),
                    "down": nn.Linear(448, 128),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(128, 4008)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["out"](block["value"](x + torch.tanh(block["query"](x))))
            x = x + block["down"](torch.sigmoid(block["gate"](x)) * block["up"](x)) * 0.5
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [4, 12])
def test_lockstep_holds_the_weights_of_two_stages_at_most(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        model = LlamaShape(layers)
    program = _with_generated_weights(
        capture_module(model, torch.zeros(2, 3, dtype=torch.int64, device="meta"))
    )
    after = program.copy()
    _move_scale_into_weight(after, Editor(after))
    after.tidy()
    live, peak = _count_live_bytes(monkeypatch)
    agreement = lockstep(program, after)
    assert agreement is not None
    assert agreement.error <= 1e-14
    largest = max(
        sum(8 * program.weights.spec(name).elements for name in stage.weights)
        for stage in stages(program)
    )
    blocks = [stage for stage in stages(program) if stage.block is not None]
    assert len(blocks) == layers
    assert largest <= peak[0] <= 2 * largest
    assert agreement.peak_weight_bytes <= 2 * largest
    del agreement
    assert live[0] == 0


def _with_generated_weights(program: Program) -> Program:
    specs = {name: program.weights.spec(name) for name in program.weights}
    source, store = Generated(specs), WeightStore()
    for name, spec in specs.items():
        store.define(name, Source(source, name), spec)
    return replace(program, weights=store)


def _count_live_bytes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[int]]:
    """Bytes of materialized weights that are alive now, and the most there ever were."""
    live, peak = [0], [0]
    materialize = WeightStore.materialize

    def free(size: int) -> None:
        live[0] -= size

    def counted(store: WeightStore, name: str, dtype: torch.dtype | None = None) -> Tensor:
        value = materialize(store, name, dtype)
        size = value.element_size() * value.nelement()
        live[0] += size
        peak[0] = max(peak[0], live[0])
        weakref.finalize(value, free, size)
        return value

    monkeypatch.setattr(WeightStore, "materialize", counted)
    return live, peak
