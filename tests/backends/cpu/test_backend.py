"""Compiled models against the interpreted program that they were lowered from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from qcompile.artifact import Artifact
from qcompile.ir.program import Program

if TYPE_CHECKING:
    from tests.backends.cpu.conftest import Artifacts, QuantizedModels

MODELS = ("llama", "llama-tied", "qwen2", "qwen3", "mistral")
WEIGHT_ONLY = ("float", "w8-rtn", "w4-rtn")
INT8_ACTIVATIONS = ("w4a8-rtn", "w8a8-rtn")
VOCABULARY = 260

EXACT = 1e-5
"""Bound for float activations, on max |difference| / max |logit|.

Both sides decode the same codes with the same float16 scales and sum the same float32 products,
in other orders: sums of 48 terms err by some 1e-6 of their terms, and two layers pass it on.
"""

ROUNDING = 3e-2
"""Bound for int8 activations, on the same quotient.

Scales are max |x| / 127 on both sides, but x itself differs by float32 rounding (1e-6 of it). An
activation that stands that close to the boundary between two codes may fall on the other side,
which changes it by a full step: 1/127 of the largest in its group, some 1e-2 of the output of a
layer with 32 inputs. That is rare: half of all logits must meet the bound for float activations.
"""


def relative_errors(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(found - expected) / np.abs(expected).max())


def assert_close(found: np.ndarray, expected: np.ndarray, recipe: str) -> None:
    errors = relative_errors(found, expected)
    if recipe in INT8_ACTIVATIONS:
        assert errors.max() <= ROUNDING
        assert np.median(errors) <= EXACT
    else:
        assert errors.max() <= EXACT


def some_ids(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCABULARY, shape)


def interpret(program: Program, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    arguments = [torch.from_numpy(value) for value in (ids, mask) if value is not None]
    logits: np.ndarray = program(*arguments)[0].numpy()
    return logits


@pytest.mark.parametrize("recipe", [*WEIGHT_ONLY, *INT8_ACTIVATIONS])
@pytest.mark.parametrize("model", MODELS)
def test_forward_equals_the_program(
    model: str, recipe: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    program, compiled = quantized(model, recipe), artifact(model, recipe)
    for shape in ((1, 1), (1, 19), (3, 9)):
        ids = some_ids(*shape)
        assert_close(compiled.forward(ids), interpret(program, ids), recipe)


@pytest.mark.parametrize("recipe", ["float", "w4-rtn", "w4a8-rtn"])
@pytest.mark.parametrize("model", MODELS)
def test_forward_of_padded_rows_equals_the_program(
    model: str, recipe: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    ids, mask = some_ids(3, 11), np.ones((3, 11), np.int64)
    mask[1, :4] = 0
    mask[2, :10] = 0
    found = artifact(model, recipe).forward(ids, mask)
    expected = interpret(quantized(model, recipe), ids, mask)
    real = mask == 1
    assert_close(found[real], expected[real], recipe)


@pytest.mark.parametrize("model", MODELS)
def test_float_artifact_equals_transformers(
    model: str, artifact: Artifacts, checkpoint: Callable[[str], Path]
) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint(model), dtype=torch.float32
    )
    ids, mask = some_ids(2, 13), np.ones((2, 13), np.int64)
    mask[0, :5] = 0
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    with torch.inference_mode():
        expected = reference(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        ).logits.numpy()
    found = artifact(model, "float").forward(ids, mask)
    assert relative_errors(found, expected)[mask == 1].max() <= EXACT


@pytest.mark.parametrize("recipe", ["float", "w4-rtn", "w4a8-rtn"])
@pytest.mark.parametrize("model", MODELS)
def test_decoding_step_by_step_equals_the_program(
    model: str, recipe: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    """Prompts of different lengths, then more tokens than a window holds."""
    ids, mask = some_ids(2, 16, seed=3), np.ones((2, 16), np.int64)
    mask[1, :3] = 0
    expected = interpret(quantized(model, recipe), ids, mask)
    decoder = artifact(model, recipe)._session.decoder(batch=2, capacity=8)
    found = [decoder.advance(ids[:, :7], mask[:, :7])]
    found[0] = found[0].copy()
    found += [decoder.advance(ids[:, i : i + 1]).copy() for i in range(7, 16)]
    assert_close(np.stack(found, axis=1), expected[:, 6:], recipe)


@pytest.mark.parametrize("recipe", ["float", "w4-rtn", "w8-rtn"])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_generation_equals_the_programs(
    model: str, recipe: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    prompts = [list(map(int, some_ids(length, seed=length))) for length in (3, 8)]
    compiled = artifact(model, recipe)
    alone = [compiled.complete(prompt, max_new_tokens=12)[0].token_ids for prompt in prompts]
    together = compiled.complete(prompts, max_new_tokens=12)
    for prompt, tokens, beside in zip(prompts, alone, together, strict=True):
        assert list(tokens) == greedy(quantized(model, recipe), prompt, 12)
        assert tokens == beside.token_ids


def greedy(program: Program, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, up to and with the end token 0; one run per token."""
    tokens: list[int] = []
    while len(tokens) < count and 0 not in tokens:
        logits = interpret(program, np.array([prompt + tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_gives_the_programs_logits(
    isa: str, quantized: QuantizedModels, artifact: Artifacts
) -> None:
    recipe = "w4a8-rtn"
    ids = some_ids(2, 9)
    found = forward_in_subprocess(artifact("llama-tied", recipe), ids, isa)
    if found is None:
        pytest.skip(f"this machine has no {isa}")
    assert_close(found, interpret(quantized("llama-tied", recipe), ids), recipe)


_FORWARD = """
import json, sys
import numpy as np
import qcompile
directory, ids = json.loads(sys.argv[1])
logits = qcompile.load(directory, threads=1).forward(np.array(ids))
json.dump(logits.tolist(), sys.stdout)
"""


def forward_in_subprocess(artifact: Artifact, ids: np.ndarray, isa: str) -> np.ndarray | None:
    """Logits by the kernels of an instruction set, or None where the machine lacks it."""
    done = subprocess.run(
        [sys.executable, "-c", _FORWARD, json.dumps([str(artifact.path), ids.tolist()])],
        env={**os.environ, "QCOMPILE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode and isa in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    return np.array(json.loads(done.stdout), np.float32)
