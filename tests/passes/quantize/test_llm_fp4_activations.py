"""LLM-FP4 with weights and activations in 4-bit floats: what its pre-shifted biases are worth."""

import pytest
import torch
from torch import nn

from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Context, Pass, PassManager
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.passes.raise_ops import raise_phase
from qcompile.passes.transform.smooth import Smooth

PRESHIFT = Smooth("preshift", weights="fp4", activations="fp4", granularity="tensor")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(256, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def uneven(x: torch.Tensor) -> Program:
    """Two layers, and channels between them whose sizes differ by up to 2^6."""
    torch.manual_seed(0)
    first, second = nn.Linear(32, 64), nn.Linear(64, 32)
    with torch.no_grad():
        sizes = 2.0 ** -(6 * torch.rand(64))
        first.weight.mul_(sizes[:, None])
        first.bias.mul_(sizes)
        second.weight.div_(sizes)
    program = canonicalize(capture_module(nn.Sequential(first, nn.ReLU(), second), x))
    return PassManager([raise_phase()]).run(program)[0]


def run(program: Program, x: torch.Tensor, *passes: Pass) -> Program:
    context = Context(calibration=Calibration(DataSource(examples=x)))
    return PassManager(passes).run(program, context)[0]


def error(program: Program, x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((program(x) - exact).norm() / exact.norm())


def test_shifts_change_no_number(uneven: Program, x: torch.Tensor) -> None:
    after = run(uneven, x, PRESHIFT)
    assert after.weights.materialize("0.weight").ne(uneven.weights.materialize("0.weight")).any()
    assert torch.equal(after(x), uneven(x))  # powers of two change no mantissa


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_shifts_take_away_what_one_scale_for_uneven_channels_costs(
    uneven: Program, x: torch.Tensor, granularity: str
) -> None:
    exact = uneven(x)
    weights = QuantizeWeights("fp4", method="llm_fp4")
    ranges = "mse" if granularity == "tensor" else "absmax"
    rounding = QuantizeActivations("fp4-searched", granularity=granularity, ranges=ranges)
    plain = error(run(uneven, x, weights, rounding), x, exact)
    shifted = error(run(uneven, x, PRESHIFT, weights, rounding), x, exact)
    # Two layers of weights and two of inputs, each with some 10 % of error of its own.
    assert shifted < 0.25
    assert shifted < 0.6 * plain
