"""Text that a model writes itself: calibration data without data."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from qcompile.calibration.data import TokenArray
from qcompile.calibration.parallel import fast_products, ordered_map
from qcompile.errors import DataError
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import ProgramOutput

GREEDY = 4
"""Tokens after the first that are the likeliest ones; the rest are sampled."""

_ROWS = 16


def generate_windows(program: Program, samples: int, length: int, *, seed: int = 0) -> TokenArray:
    """Lets a model write windows of text, each from a different random first token.

    Args:
        program: A language model with a cache.
        samples: Windows.
        length: Tokens per window.
        seed: For the first tokens and for sampling; equal seeds give equal windows.

    Returns:
        int64 [samples, length].

    Raises:
        DataError: The model cannot write.

    Source: Liu et al. 2023 (LLM-QAT), section 2.1.
    """
    if not program.signature.is_causal_lm:
        raise DataError(
            f"'{program.provenance.name}' cannot write its own calibration text: it is no language "
            "model with a cache",
            remedy="pass a text file or tokens",
        )
    weights: dict[str, Tensor] = {}
    interpreter = Interpreter(program, cache=weights)
    vocabulary = int(
        _step(interpreter, torch.zeros(1, 1, dtype=torch.int64), 1, None).logits.shape[2]
    )
    first = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    chunks = list(first.repeat(-(-samples // vocabulary))[:samples].unsqueeze(1).split(_ROWS))
    write = partial(_write, program, weights, chunks, length, seed)
    with fast_products():
        written = list(ordered_map(write, range(len(chunks))))
    return np.asarray(torch.cat(written).numpy())


def _write(
    program: Program,
    weights: dict[str, Tensor],
    chunks: list[Tensor],
    length: int,
    seed: int,
    index: int,
) -> Tensor:
    """Continues a chunk of first tokens, [rows, 1] to [rows, length]."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    interpreter = Interpreter(program, cache=weights)
    ids = chunks[index]
    past: tuple[Tensor, ...] | None = None
    while ids.shape[1] < length:
        output = _step(interpreter, ids[:, -1:], ids.shape[1], past)
        past = output.past_key_values
        logits = output.logits[:, -1].float()
        if ids.shape[1] <= GREEDY:
            following = logits.argmax(-1, keepdim=True)
        else:
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat((ids, following), dim=1)
    return ids


def _step(
    interpreter: Interpreter, ids: Tensor, total: int, past: tuple[Tensor, ...] | None
) -> ProgramOutput:
    program = interpreter.program
    mask = torch.ones(len(ids), total, dtype=torch.int64)
    return ProgramOutput(interpreter.run(*program.bind(ids, mask, past_key_values=past)))
