"""Artifacts whose caches round, against the interpreted program."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from qcompile.kernels.kv_append.rows import row_bytes

if TYPE_CHECKING:
    from tests.backends.cpu.conftest import Artifacts, QuantizedModels

MODELS = ("llama", "qwen3", "mistral")
WIDTH = 8  # of a head

TYPICAL = {"w4-rtn-kv8": 1e-5, "w4a8-rtn-kv8": 1e-5, "w4a8-quarot-kv4": 1e-2}
"""Median of |difference| / max |logit|.

Of float activations as in `test_backend`. With 8-bit activations and a 4-bit cache, some of the
10,000 keys and values before the last tokens stand within float32 rounding of the boundary between
two codes, fall on the other side, and every later token sees it.
"""

WORST = {"w4-rtn-kv8": 3e-2, "w4a8-rtn-kv8": 5e-2, "w4a8-quarot-kv4": 0.2}
"""Largest of the same: a step is 1/255 of a head's range at 8 bits, 1/15 at 4."""


def some_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 260, shape)


def assert_close(found: np.ndarray, expected: np.ndarray, recipe: str) -> None:
    errors = np.abs(found - expected) / np.abs(expected).max()
    assert errors.max() <= WORST[recipe]
    assert np.median(errors) <= TYPICAL[recipe]


def interpret(program: object, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    logits: np.ndarray = program(torch.from_numpy(ids), torch.from_numpy(mask))[0].numpy()  # type: ignore[operator]
    return logits


@pytest.mark.parametrize("recipe", ["w4-rtn-kv8", "w4a8-rtn-kv8"])
@pytest.mark.parametrize("model", MODELS)
def test_forward_equals_the_program(
    model: str, recipe: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    ids, mask = some_ids(3, 11), np.ones((3, 11), np.int64)
    mask[1, :4], mask[2, :10] = 0, 0
    found = artifact(model, recipe).forward(ids, mask)
    expected = interpret(quantized(model, recipe), ids, mask)
    assert_close(found[mask == 1], expected[mask == 1], recipe)


@pytest.mark.parametrize("recipe", ["w4-rtn-kv8", "w4a8-quarot-kv4"])
@pytest.mark.parametrize("model", MODELS)
def test_decoding_step_by_step_equals_the_program(
    model: str, recipe: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    """Prompts of different lengths, then more tokens than the buffers held at first."""
    ids, mask = some_ids(2, 80, seed=3), np.ones((2, 80), np.int64)
    mask[1, :3] = 0
    expected = interpret(quantized(model, recipe), ids, mask)
    decoder = artifact(model, recipe)._session.decoder(batch=2, capacity=8)
    found = [decoder.advance(ids[:, :60], mask[:, :60]).copy()]
    found += [decoder.advance(ids[:, i : i + 1]).copy() for i in range(60, 80)]
    assert_close(np.stack(found, axis=1), expected[:, 59:], recipe)


@pytest.mark.parametrize("model", MODELS)
def test_prompts_of_different_lengths_generate_together_what_each_does_alone(
    model: str, artifact: Artifacts
) -> None:
    compiled = artifact(model, "w4-rtn-kv8")
    prompts = [list(map(int, some_ids(length, seed=length))) for length in (3, 8, 20)]
    alone = [compiled.complete(prompt, max_new_tokens=12)[0].token_ids for prompt in prompts]
    together = compiled.complete(prompts, max_new_tokens=12)
    assert [completion.token_ids for completion in together] == alone


@pytest.mark.parametrize(
    ("recipe", "format"), [("w4-rtn-kv8", "int8"), ("w4a8-quarot-kv4", "int4")]
)
def test_buffers_hold_what_the_format_needs(recipe: str, format: str, artifact: Artifacts) -> None:
    compiled = artifact("llama", recipe)
    for past, present in compiled.manifest.signature.cache_pairs():
        for value in (past, present):
            assert value.dtype == "uint8"
            assert value.shape == ("batch", 2, "capacity", row_bytes(WIDTH, format, 0))
