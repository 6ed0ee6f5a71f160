"""What the tests of transform methods share: models, calibration data, and how results compare."""

from __future__ import annotations

import torch
from tests.frontends.tiny_models import VOCABULARY, raised_tiny_model
from torch import Tensor, fx

from qcompile.calibration.samples import TokenWindows
from qcompile.calibration.settings import Calibration
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Pass, PassManager, PassResult

ARCHITECTURES = ["llama-tied", "gemma2", "phi3", "gpt2"]
"""Tied embeddings and grouped heads; soft caps and post-norms; fused projections; layer norms with
biases."""

EQUIVALENT = 1e-10
"""What the project promises of transforms in float64: max |difference| over max |logit|."""


def tiny(name: str) -> Program:
    """A tiny random model of an architecture, raised."""
    return raised_tiny_model(name)[1].copy()


def with_outliers(
    program: Program, source: str, channels: list[int], factor: float, axis: int = 0
) -> Program:
    """The program with some channels of a linear times a factor.

    Args:
        program: It is not changed.
        source: Name of the weight.
        channels: Rows of the weight: outputs.
        factor: What they are multiplied by.
        axis: 1 for columns: inputs.
    """

    def scaled(weight: Tensor) -> Tensor:
        factors = torch.ones(weight.shape[axis], dtype=weight.dtype)
        factors[channels] = factor
        return weight * (factors[:, None] if axis == 0 else factors)

    changed = program.copy()
    spec = changed.weights.spec(source)
    changed.weights.derive(source, (source,), scaled, spec, exact=False, label="outliers")
    return changed


def calibrated(windows: int = 4, length: int = 16) -> Context:
    """A context with random tokens."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(2, VOCABULARY, (windows, length), generator=generator)
    return Context(calibration=Calibration(TokenWindows(tokens.numpy())))


def apply(
    program: Program, *passes: Pass, context: Context | None = None
) -> tuple[Program, PassResult]:
    """The program after some passes, and the result of the last."""
    after, records = PassManager(passes).run(program, context or calibrated())
    return after, records[-1].result


def function_error(before: Program, after: Program) -> float:
    """Max |difference| over max |logit| in float64, on tokens that nothing was calibrated on."""
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    expected, found = (_logits(program, ids, torch.float64) for program in (before, after))
    return float((found - expected).abs().max() / expected.abs().max())


def values_of(program: Program, *nodes: fx.Node) -> list[Tensor]:
    """What nodes compute on calibration data, ``[tokens, channels]`` float64 each."""
    wanted = {node.name for node in nodes}
    found: dict[str, Tensor] = {}

    def keep(node: fx.Node, value: object) -> object:
        if node.name in wanted and isinstance(value, Tensor):
            found[node.name] = value.flatten(0, -2)
        return value

    data = calibrated().calibration.inputs(program, "a test")
    (batch,) = data.batches(program, 1 << 20)
    Interpreter(program, dtype=torch.float64, hook=keep).run(*batch)
    return [found[node.name] for node in nodes]


def _logits(program: Program, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return Interpreter(program, dtype=dtype).run(*program.bind(ids))[0]
