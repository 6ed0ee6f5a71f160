from __future__ import annotations

import pytest
import torch
from tests.passes.transform.methods import (
    ARCHITECTURES,
    EQUIVALENT,
    apply,
    calibrated,
    function_error,
    tiny,
)

from qcompile.calibration.samples import ExampleInputs
from qcompile.calibration.settings import Calibration
from qcompile.errors import DataError, ModelError
from qcompile.frontends.torch_export import capture_module
from qcompile.passes.infra import Context, run_passes
from qcompile.passes.transform.centre_norms import CentreNorms
from qcompile.passes.transform.fold_norm_gain import FoldNormGain
from qcompile.passes.transform.rotate import Rotate
from qcompile.passes.transform.spinquant import Spinquant
from qcompile.pipeline import front_phases

BARE = (FoldNormGain(), CentreNorms())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_spinquant_keeps_the_function(name: str) -> None:
    before = tiny(name)
    after, result = apply(before, *BARE, Spinquant(steps=2, batch_tokens=32))
    assert result.rewrites > 0
    assert function_error(before, after) < EQUIVALENT


def test_training_lowers_the_loss_below_that_of_random_hadamard_matrices() -> None:
    online = Rotate("none", "none", online=["down_proj"])
    method = Spinquant(bits=3, steps=25)
    _, result = apply(tiny("llama"), *BARE, online, method, context=calibrated(8, 32))
    *sites, losses = result.details
    assert [site["place"] for site in sites] == ["residual stream", "values", "values"]
    # It sees the text that it is judged on: 0.2 nats fewer per token were seen.
    assert losses["loss_after"] < losses["loss_before"] - 0.05


def test_training_sees_rounded_weights() -> None:
    free, rounded = (
        apply(tiny("llama"), *BARE, Spinquant(weights=format, steps=0), context=calibrated())[1]
        for format in ("float", "int2")
    )
    assert rounded.details[-1]["loss_before"] != free.details[-1]["loss_before"]


def test_training_lowers_the_loss_with_rounded_weights() -> None:
    method = Spinquant(bits=8, weights="int3", steps=25)
    _, result = apply(tiny("llama"), *BARE, method, context=calibrated(4, 32))
    losses = result.details[-1]
    assert losses["loss_after"] < losses["loss_before"] - 0.01


def test_training_that_does_not_help_leaves_the_start() -> None:
    program = tiny("llama")
    still, result = apply(program, *BARE, Spinquant(steps=1, rate=0.0))
    losses = result.details[-1]
    assert losses["loss_after"] == losses["loss_before"]
    assert function_error(program, still) < EQUIVALENT


def test_spinquant_without_calibration_data_says_so() -> None:
    with pytest.raises(DataError, match="SpinQuant needs calibration data"):
        apply(tiny("llama"), *BARE, Spinquant(), context=Context())


def test_program_without_logits_has_no_loss() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.RMSNorm(8), torch.nn.Linear(8, 3))
    program = capture_module(block, torch.randn(5, 4))
    for phase in front_phases():
        program = run_passes(program, list(phase.passes))
    context = Context(calibration=Calibration(ExampleInputs([torch.randn(5, 4)])))
    with pytest.raises(ModelError, match="does not map tokens to logits"):
        apply(program, *BARE, Spinquant(), context=context)


def test_same_seed_gives_the_same_rotations() -> None:
    first, second = (
        apply(tiny("llama"), *BARE, Spinquant(steps=2), context=calibrated())[0] for _ in range(2)
    )
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(first.weights.materialize(name), second.weights.materialize(name))
