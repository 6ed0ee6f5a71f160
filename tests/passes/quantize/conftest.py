"""Small programs to quantize."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Port, Role


class TinyLM(nn.Module):
    """Token and position embeddings, two branches from one input, a head behind a soft cap."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 20)
        self.positions = nn.Embedding(8, 20)
        self.gate = nn.Linear(20, 32, bias=False)
        self.up = nn.Linear(20, 32)
        self.down = nn.Linear(32, 20, bias=False)
        self.head = nn.Linear(20, 24, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.positions(torch.ones_like(input_ids).cumsum(-1) - 1)
        x = x + self.down(torch.relu(self.gate(x)) * self.up(x))
        return torch.tanh(self.head(x) / 8.0) * 8.0


@cache
def _language_model(tied: bool) -> Program:
    torch.manual_seed(0)
    model = TinyLM(tied)
    program = capture_module(model, torch.zeros(2, 5, dtype=torch.int64))
    signature = replace(
        program.signature,
        inputs=(Port("input_ids", Role.INPUT_IDS),),
        outputs=(Port("logits", Role.LOGITS),),
    )
    return replace(program, signature=signature, facts=frozenset({Fact.CANONICAL}))


@pytest.fixture
def untied() -> Program:
    return _language_model(tied=False).copy()


@pytest.fixture
def tied() -> Program:
    return _language_model(tied=True).copy()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.arange(10).reshape(2, 5)


@pytest.fixture
def linear() -> Program:
    """One linear, x [s0, 32] -> [s0, 4]."""
    torch.manual_seed(0)
    program = capture_module(nn.Linear(32, 4), torch.zeros(3, 32))
    return replace(program, facts=frozenset({Fact.CANONICAL}))
