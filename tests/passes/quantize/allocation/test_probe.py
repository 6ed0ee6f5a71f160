"""Runs that begin in the middle give what whole runs give."""

import pytest
import torch

from qcompile.calibration.samples import TokenWindows
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.passes.quantize.allocation.probe import Probe

UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def _changed(program: Program, name: str) -> tuple[Program, torch.Tensor]:
    weight = program.weights.materialize(name)
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    other = program.copy()
    other.weights.put(name, weight + 0.02 * drawn)
    return other, weight + 0.02 * drawn


@pytest.mark.parametrize("name", [UP, QUERY, "model.embed_tokens.weight"])
def test_changes_are_those_of_a_whole_run(llama: Program, windows: TokenWindows, name: str) -> None:
    (inputs,) = windows.batches(llama, 1024)
    probe = Probe(llama, inputs)
    other, weight = _changed(llama, name)
    found, whole = probe.change({name: weight}), probe.change_to(other)
    assert found == whole
    before, after = (
        torch.log_softmax(Interpreter(p).run(*inputs)[0].double(), -1) for p in (llama, other)
    )
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert found.divergence == pytest.approx(float(divergence), rel=1e-3)
    following = inputs[0][:, 1:, None]
    surprise = (before - after)[:, :-1].gather(-1, following).mean()
    assert found.surprise == pytest.approx(float(surprise), abs=1e-6)


def test_changes_leave_nothing_behind(llama: Program, windows: TokenWindows) -> None:
    (inputs,) = windows.batches(llama, 1024)
    probe = Probe(llama, inputs)
    _, weight = _changed(llama, UP)
    first = probe.change({UP: weight})
    probe.change({QUERY: torch.zeros_like(llama.weights.materialize(QUERY))})
    assert probe.change({UP: weight}) == first
    assert probe.change({UP: llama.weights.materialize(UP)}).divergence < 1e-12


def test_late_changes_do_not_run_early_layers(llama: Program, windows: TokenWindows) -> None:
    (inputs,) = windows.batches(llama, 1024)
    probe = Probe(llama, inputs)
    probe._weights.pop(QUERY)  # would be read anew
    probe.change({UP: llama.weights.materialize(UP)})
    assert QUERY not in probe._weights


def test_programs_without_logits_are_compared_by_their_first_result(blocks: Program) -> None:
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    probe = Probe(blocks, [x])
    other, weight = _changed(blocks, "1.up.weight")
    before, after = blocks(x), other(x)
    expected = float((after - before).square().sum() / before.square().sum())
    change = probe.change({"1.up.weight": weight})
    assert change.divergence == pytest.approx(expected, rel=1e-4)
    assert change.surprise is None
