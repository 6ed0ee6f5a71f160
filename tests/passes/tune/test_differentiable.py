from __future__ import annotations

import pytest
import torch
from tests.passes.transform.methods import calibrated, tiny
from torch import Tensor

from qcompile.ir.interpreter import Interpreter
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.reference import dynamic_scale, quantize
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.tune.differentiable import (
    RoundedRun,
    next_token_loss,
    round_straight_through,
)


def unchanged(name: str, weight: Tensor) -> Tensor:
    del name
    return weight


def test_straight_through_rounds_as_the_dialect_does() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    scale = dynamic_scale(x, 4, 0)
    expected = dequantize(quantize(x, scale, None, 4, 0), scale, None, 4, 0)
    torch.testing.assert_close(round_straight_through(x, 4), expected, rtol=1e-6, atol=1e-6)


def test_straight_through_passes_gradients_to_values_and_scales() -> None:
    x = torch.tensor([[0.2, -0.5, 7.0]], requires_grad=True)  # a scale of 1 at 4 bits
    round_straight_through(x, 4)[0, 0].backward()
    # d(s round(x/s)): 1 by x itself; by the scale round(x/s) - x/s = -0.2, of which the largest
    # value is 7 times.
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0.0, -0.2 / 7]]))


def test_loss_is_that_of_the_program_with_quantized_activations() -> None:
    program = tiny("llama")
    weights = QuantizeWeights("int8", lm_head="float")
    (batch,) = calibrated().calibration.inputs(program, "a test").batches(program, 1 << 20)
    # The same weights on both sides: those that 8 bits can hold.
    quantized = run_passes(program, [weights, QuantizeActivations("int4")])
    names = [name for name in quantized.weights if name.endswith(".codes")]
    assert names
    decoded = {
        name.removesuffix(".codes"): dequantize(
            quantized.weights.materialize(name),
            quantized.weights.materialize(name.replace(".codes", ".scale")),
            None,
            8,
            0,
        )
        for name in names
    }
    run = RoundedRun(program, 4, lambda name, w: decoded.get(name, w), {})
    expected = next_token_loss(quantized, Interpreter(quantized), batch)
    found = next_token_loss(program, run, batch)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_weights() -> None:
    program = tiny("llama")
    (batch,) = calibrated().calibration.inputs(program, "a test").batches(program, 1 << 20)
    factor = torch.ones((), requires_grad=True)
    run = RoundedRun(program, 8, lambda name, w: w * factor if "down_proj" in name else w, {})
    (gradient,) = torch.autograd.grad(next_token_loss(program, run, batch), factor)
    assert gradient.abs() > 1e-6


def test_padding_is_not_predicted() -> None:
    program = tiny("llama")
    ids = torch.randint(2, 90, (1, 8), generator=torch.Generator().manual_seed(0))
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.int64), ids), dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    run = RoundedRun(program, 8, unchanged, {})
    expected = next_token_loss(program, run, program.bind(ids))
    found = next_token_loss(program, run, program.bind(padded, mask))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
