"""Decoders that keep states of fixed size generate on every target that runs here."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from tests.frontends.tiny_models import (
    STATES,
    TOLERANCE,
    decoded_logits,
    raised_tiny_model,
    relative_error,
    tokens,
)

from qcompile.artifact import Artifact, load
from qcompile.backends.cpu.decoding import CachedDecoder
from qcompile.backends.cpu.runtime import CpuSession
from qcompile.backends.decoding import Decoder, GrowingDecoder, TokenBatch
from qcompile.backends.onnx.runtime import OnnxSession
from qcompile.backends.onnx.target import OnnxTarget
from qcompile.compiler import compile
from qcompile.errors import TargetError
from qcompile.manifest import read_manifest
from qcompile.passes.infra import Context, run_passes
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

FAST = "lfm2"
NAMES = [
    FAST,
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in STATES if name != FAST),
]
TARGETS: dict[str, tuple[type[OnnxSession], type[Decoder]]] = {
    "cpu": (CpuSession, CachedDecoder),
    "onnx": (OnnxSession, GrowingDecoder),
}
W4 = {"name": "w4", "steps": [{"quantize_weights": {"format": "int4-g16"}}]}


def text(artifact: Artifact, *prompts: list[int]) -> list[list[int]]:
    completions = artifact.complete(list(prompts), max_new_tokens=5)
    return [list(completion.token_ids) for completion in completions]


def until_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens up to the first that ends a text, and that one."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_text_equals_that_of_transformers(name: str, target: str, tmp_path: Path) -> None:
    """Two prompts of different lengths at once, so that one is padded, and each alone."""
    model, _ = raised_tiny_model(name)
    ids, mask = tokens(2, 7, (0, 3))
    prompts = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(ids, attention_mask=mask, **options)[:, 7:].tolist()

    compile(model, "float", target=target, output=tmp_path / "a", check="off")
    artifact = load(tmp_path / "a")

    expected = [until_end(row, artifact.manifest.generation.eos_token_ids) for row in written]
    assert text(artifact, *prompts) == expected
    assert [text(artifact, prompt)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_quantized_logits_equal_those_of_the_program(
    name: str, target: str, tmp_path: Path
) -> None:
    model, raised = raised_tiny_model(name)
    ids, mask = tokens(2, 8, (0, 3))
    cuts = (5, 6, 7)
    program = run_passes(raised, [QuantizeWeights("int4-g16")])
    expected = decoded_logits(program, ids, mask, cuts)

    compile(model, W4, target=target, output=tmp_path / "a", check="off")
    session, kind = TARGETS[target]
    decoder = session(tmp_path / "a", read_manifest(tmp_path / "a"), threads=1).decoder(2, 8)
    found = []
    for start, end in itertools.pairwise((0, *cuts, 8)):
        part = TokenBatch(ids[:, start:end].numpy(), mask[:, start:end].numpy())
        found.append(torch.tensor(decoder.append(part, count=end - start)))

    assert isinstance(decoder, kind)
    assert relative_error(torch.cat(found, dim=1), expected, mask) <= TOLERANCE


def test_fixed_shapes_take_one_token_at_a_time(tmp_path: Path) -> None:
    model, _ = raised_tiny_model(FAST)
    expected = text(
        compile(model, "float", target="onnx", output=tmp_path / "a", check="off"), [2, 3]
    )

    fixed = OnnxTarget(query=1, past=16)
    found = text(compile(model, "float", target=fixed, output=tmp_path / "b", check="off"), [2, 3])

    assert found == expected


@pytest.mark.slow
def test_fixed_shapes_are_refused_for_states_alone() -> None:
    with pytest.raises(TargetError, match="keeps states only"):
        OnnxTarget(query=1, past=16).lower(raised_tiny_model("mamba2")[1], Context())


def test_fixed_shapes_of_several_tokens_are_refused_with_states() -> None:
    with pytest.raises(TargetError, match="only be compiled for query=1, not 4"):
        OnnxTarget(query=4, past=16).lower(raised_tiny_model(FAST)[1], Context())
