"""A small language model whose layers matter differently, and tokens for it."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile as qc
from qcompile.calibration.samples import TokenWindows
from qcompile.ir.program import Program

SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 80, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@cache
def _llama() -> Program:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, **HEADS, max_position_embeddings=64, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.15 if "layers.1" in name else 0.05)
        model.model.embed_tokens.weight.normal_(std=0.3)
    return qc.capture(model)


@pytest.fixture
def llama() -> Program:
    """Two layers, tied embeddings."""
    return _llama().copy()


@pytest.fixture
def windows() -> TokenWindows:
    """4 x 32 tokens."""
    return TokenWindows(np.random.default_rng(0).integers(0, 80, (4, 32)))


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(24, 48, bias=False)
        self.down = torch.nn.Linear(48, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def blocks() -> Program:
    """Three residual blocks; x [n, 24] -> [n, 24]."""
    torch.manual_seed(0)
    return qc.capture(torch.nn.Sequential(*(_Block() for _ in range(3))), torch.randn(5, 24))
