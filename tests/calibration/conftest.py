"""A small program with repeating blocks, and data for it."""

from functools import cache

import pytest
import torch
from torch import nn

from qcompile.calibration.samples import ExampleInputs
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.infra import run_passes
from qcompile.pipeline import front_phases


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


@cache
def _blocks() -> Program:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(24) for _ in range(3)), nn.Linear(24, 7))
    program = capture_module(model, torch.randn(5, 24))
    for phase in front_phases():
        program = run_passes(program, list(phase.passes))
    return program


@pytest.fixture
def blocks() -> Program:
    """Three residual blocks of width 24, then a linear; x [n, 24] -> [n, 7]."""
    return _blocks().copy()


@pytest.fixture
def samples() -> ExampleInputs:
    """Four micro-batches of 16 rows."""
    generator = torch.Generator().manual_seed(1)
    return ExampleInputs([torch.randn(16, 24, generator=generator) for _ in range(4)])
