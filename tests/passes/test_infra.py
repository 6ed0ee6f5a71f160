from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qcompile.errors import EquivalenceError, QCompileError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.ir.verify import MalformedProgramError
from qcompile.passes.infra import Context, Pass, PassManager, PassResult, Phase, run_passes

aten = torch.ops.aten


class Swap(Pass):
    """Turns every relu into another operator."""

    def __init__(self, target: Any = aten.sigmoid.default) -> None:
        self.target = target

    def run(self, program: Program, context: Context) -> PassResult:
        nodes = list(program.calls(aten.relu.default))
        for node in nodes:
            node.target = self.target
        return PassResult(rewrites=len(nodes))


class Idle(Pass):
    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult()


class NeedsRaised(Idle):
    requires = frozenset({Fact.RAISED})


class EnsuresRaised(Idle):
    ensures = frozenset({Fact.RAISED})


class InvalidatesRaised(Idle):
    invalidates = frozenset({Fact.RAISED})


@pytest.fixture
def program() -> Program:
    return capture_module(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.randn(3, 2))


def test_passes_edit_a_copy(program: Program) -> None:
    after = run_passes(program, [Swap()])
    assert "aten.sigmoid" in after.text()
    assert "aten.relu" in program.text()


def test_record_says_what_happened(program: Program) -> None:
    _, (record,) = PassManager([Swap()]).run(program)
    assert (record.name, record.phase, record.result.rewrites) == ("swap", "swap", 1)
    assert record.nodes == len(program.graph.nodes)
    assert record.seconds >= 0
    assert record.error is None


def test_facts_flow_through_the_pipeline(program: Program) -> None:
    after = run_passes(program, [EnsuresRaised(), NeedsRaised()])
    assert Fact.RAISED in after.facts


def test_missing_fact_is_found_before_anything_runs(program: Program) -> None:
    swap = Swap()
    manager = PassManager([Phase("first", (swap,)), Phase("second", (NeedsRaised(),))])
    with pytest.raises(
        QCompileError, match=r"'needs_raised' \(phase 'second'\) needs a program that is raised"
    ):
        manager.run(program)
    assert "aten.relu" in program.text()


def test_invalidated_fact_is_missing_afterwards(program: Program) -> None:
    manager = PassManager([EnsuresRaised(), InvalidatesRaised(), NeedsRaised()])
    with pytest.raises(QCompileError, match="'needs_raised'"):
        manager.check_facts(program.facts)


def test_malformed_result_names_the_pass(program: Program) -> None:
    with pytest.raises(MalformedProgramError, match=r"pass 'swap': .*no operator of the IR"):
        run_passes(program, [Swap(torch.relu)])


def test_checker_sees_before_and_after_and_its_verdict_names_the_pass(program: Program) -> None:
    def refuse(before: Program, after: Program, item: Pass) -> float | None:
        assert "aten.relu" in before.text()
        assert "aten.sigmoid" in after.text()
        raise EquivalenceError("node 'relu' differs by 0.5")

    with pytest.raises(EquivalenceError, match="pass 'swap': node 'relu' differs"):
        PassManager([Swap()], checker=refuse).run(program)


def test_checker_is_not_asked_about_passes_that_changed_nothing(program: Program) -> None:
    def fail(before: Program, after: Program, item: Pass) -> float | None:
        raise AssertionError

    _, (record,) = PassManager([Idle()], checker=fail).run(program)
    assert record.error is None


def test_error_of_the_checker_is_recorded(program: Program) -> None:
    _, (record,) = PassManager([Swap()], checker=lambda *_: 3e-12).run(program)
    assert record.error == 3e-12


def test_insert_before_and_after_keep_the_phase(program: Program) -> None:
    manager = PassManager([Phase("only", (EnsuresRaised(), NeedsRaised()))])
    manager.insert_after("ensures_raised", Swap())
    manager.insert_before("ensures_raised", Idle())
    (phase,) = manager.phases
    names = [item.name for item in phase.passes]
    assert names == ["idle", "ensures_raised", "swap", "needs_raised"]


def test_insert_beside_an_unknown_pass_lists_the_known(program: Program) -> None:
    with pytest.raises(QCompileError, match="no pass is called 'fuse'") as caught:
        PassManager([Idle(), Swap()]).insert_after("fuse", Idle())
    assert caught.value.remedy == "known passes: idle, swap"


def test_phase_dumps_see_each_phase_once(program: Program) -> None:
    seen: list[tuple[str, bool]] = []
    manager = PassManager(
        [Phase("one", (Idle(), Swap())), Phase("two", (Idle(),))],
        on_phase=lambda name, after: seen.append((name, "aten.sigmoid" in after.text())),
    )
    manager.run(program)
    assert seen == [("one", True), ("two", True)]
