from __future__ import annotations

import torch
from torch import Tensor, nn

import qcompile as qc
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.infra import PassManager, PassResult, run_passes
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.untie_weights import UntieWeights


class Mixer(nn.Module):
    """A residual block around a norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 6), norm
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        return x + self.a(y) * self.b(y)


def captured(model: nn.Module) -> Program:
    torch.manual_seed(0)
    return qc.capture(model, torch.randn(4, 3))


def apply(program: Program, *passes: qc.Pass) -> tuple[Program, list[PassResult]]:
    after, records = PassManager(passes).run(program)
    return after, [record.result for record in records]


def assert_same_function(before: Program, after: Program) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    (expected,), (found,) = (Interpreter(p, dtype=torch.float64).run(x) for p in (before, after))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-13


def test_gain_moves_into_all_consumers() -> None:
    before = captured(Mixer(nn.RMSNorm(6, eps=1e-6)))
    after, (result,) = apply(before, FoldNormGain())
    assert result.rewrites == 1
    assert Fact.GAINS_FOLDED in after.facts
    assert "@norm.weight" not in after.text()
    assert "qc.rms_norm(%0, None, 1e-06)" in after.text()
    assert_same_function(before, after)


def test_shift_moves_into_biases_and_makes_those_that_are_missing() -> None:
    before = captured(Mixer(nn.LayerNorm(6)))
    after, _ = apply(before, FoldNormGain())
    assert "qc.layer_norm(%0, None, None, 1e-05)" in after.text()
    assert "@a.weight, @a.bias" in after.text()
    assert "@b.weight, @b.weight_bias" in after.text()
    assert_same_function(before, after)


def test_bare_layer_norms_become_rms_norms_of_centred_sources() -> None:
    before = captured(Mixer(nn.LayerNorm(6)))
    after, (_, result) = apply(before, FoldNormGain(), CentreNorms())
    # The stream is an output here, so its mean may not be taken away.
    assert result.rewrites == 0
    assert_same_function(before, after)


def test_gain_that_feeds_more_than_linears_stays_with_its_reason() -> None:
    class Tapped(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.embed(x))
            return y + self.a(y)

    before = captured(Tapped(nn.RMSNorm(6)))
    after, (result,) = apply(before, FoldNormGain())
    assert result.rewrites == 0
    assert "gain feeds aten.add" in result.skips[0].reason
    assert "@norm.weight" in after.text()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 6), nn.RMSNorm(6)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.table(ids)), self.table.weight)


def test_folding_into_a_tied_weight_unties_it() -> None:
    before = qc.capture(Tied(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    after = run_passes(before, [FoldNormGain()])
    ids = torch.tensor([[6, 0]])
    torch.testing.assert_close(after(ids), before(ids), rtol=0, atol=1e-6)
    assert "@table.weight_untied" in after.text()


def test_untying_states_its_cost_and_keeps_every_bit() -> None:
    before = qc.capture(Tied(), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    after, (result,) = apply(before, UntieWeights())
    assert result.details == [
        {"weight": "table.weight", "copy": "table.weight_untied", "extra_bits": 7 * 6 * 32}
    ]
    ids = torch.tensor([[6, 0]])
    assert torch.equal(after(ids), before(ids))
