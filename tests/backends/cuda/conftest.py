"""A two-layer language model for the `cuda` target."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qcompile as qc
from qcompile.ir.program import Program
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A Llama of two layers with tied embeddings."""
    return tiny_checkpoint("llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def captured(checkpoint: Path) -> Program:
    return qc.capture(checkpoint)


@pytest.fixture(scope="session")
def quantized(captured: Program) -> Program:
    """int4 in short groups with zero points, and int8 activations."""
    passes = [QuantizeWeights("int4-g12-asym"), QuantizeActivations()]
    return run_passes(captured, passes)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 260, (2, 7), generator=torch.Generator().manual_seed(0))
