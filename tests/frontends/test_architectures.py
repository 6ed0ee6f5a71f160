"""Every architecture is captured, raised, and computes what transformers computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.frontends.tiny_models import (
    CORE,
    GROWING_ROPE,
    MORE,
    STATES,
    TOLERANCE,
    WITHOUT_CACHE,
    decoded_logits,
    expected_decoded_logits,
    expected_logits,
    raised_tiny_model,
    relative_error,
    tiny_model,
    tokens,
)

from qcompile.frontends.huggingface import capture_directory
from qcompile.ir.program import Program
from qcompile.ir.text import format_target
from qcompile.ir.types import Role

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MORE]

ENCODERS = {
    *("bert", "distilbert", "roberta", "modernbert", "electra", "albert", "mpnet"),
    *("xlm-roberta", "nomic-bert", "esm"),
}


def operators(program: Program) -> Counter[str]:
    return Counter(format_target(node.target) for node in program.calls())


@pytest.mark.parametrize("name", [*CORE, *SLOW])
def test_architecture_raised_equals_transformers(name: str) -> None:
    model, program = raised_tiny_model(name)

    for batch, length, padding in ((2, 11, (0, 4)), (1, 1, (0,))):
        ids, mask = tokens(batch, length, padding)
        expected = expected_logits(model, ids, mask)
        assert relative_error(program(ids, mask).logits, expected, mask) <= TOLERANCE
    if name not in ENCODERS:
        assert program.signature.is_causal_lm
        ids, mask = tokens(3, 9, (2, 0, 5))
        found = decoded_logits(program, ids, mask, cuts=(6, 7))
        expected = expected_decoded_logits(model, ids, mask, cuts=(6, 7))
        assert relative_error(found, expected, mask) <= TOLERANCE


@pytest.mark.parametrize("name", [*CORE, *SLOW])
def test_architecture_raised_leaves_no_attention_spelled_out(name: str) -> None:
    found = operators(raised_tiny_model(name)[1])

    layers = 4 if name == "diffllama" else 2  # two attentions per layer
    assert found["qc.attention"] == layers
    assert found["aten.matmul"] == 0
    assert found["aten.rsqrt"] == found["aten.layer_norm"] == 0
    assert found["qc.rms_norm"] + found["qc.layer_norm"] >= 3


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "gemma3", "gpt-neox"])
def test_raised_decoder_has_rope_and_mask_as_attributes(name: str) -> None:
    _, program = raised_tiny_model(name)
    mask_input = next(
        node
        for node, port in zip(program.inputs, program.signature.inputs, strict=True)
        if port.role is Role.ATTENTION_MASK
    )

    assert operators(program)["qc.rope"] == 4
    windows = []
    for node in program.calls(torch.ops.qc.attention.default):
        _, _, _, mask, key_mask, _, _, causal, window, _ = node.args
        assert (mask, key_mask, causal) == (None, mask_input, True)
        windows.append(window)
    assert windows == {"mistral": [4, 4], "gemma3": [4, 0]}.get(name, [0, 0])


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_raised_experts_are_one_operator_per_layer(name: str) -> None:
    assert operators(raised_tiny_model(name)[1])["qc.experts"] == 2


@pytest.mark.parametrize("name", WITHOUT_CACHE)
def test_decoder_with_another_state_is_captured_without_cache_and_says_so(name: str) -> None:
    model, program = raised_tiny_model(name)
    ids, mask = tokens(2, 9, (0, 3))

    assert not program.signature.has(Role.PAST_KEY)
    (note,) = (n for n in program.notes if "without its cache, so that it cannot generate" in n)
    assert "loops over its text" in note
    found = program(ids, mask).logits
    assert relative_error(found, expected_logits(model, ids, mask), mask) <= TOLERANCE


@pytest.mark.parametrize("name", GROWING_ROPE)
def test_rotary_scaling_follows_the_length_of_the_sequence(name: str) -> None:
    model, program = raised_tiny_model(name)

    assert operators(program)["qc.rope"] == 4
    for length in (6, 14):
        ids, mask = tokens(1, length, (0,))
        expected = expected_logits(model, ids, mask)
        assert relative_error(program(ids, mask).logits, expected, mask) <= TOLERANCE


DIRECTORIES = [
    ("llama", torch.float32, "1GB"),
    ("llama-tied", torch.bfloat16, "20KB"),
    ("gpt-neox", torch.float16, "20KB"),
    ("mixtral", torch.bfloat16, "20KB"),
    ("gpt2", torch.float16, "1GB"),
    ("bert", torch.float32, "20KB"),
    *(
        pytest.param(name, torch.bfloat16, "20KB", marks=pytest.mark.slow)
        for name in (*MORE, *STATES)
    ),
]


@pytest.mark.parametrize(("name", "dtype", "shard"), DIRECTORIES)
def test_directory_captured_equals_from_pretrained(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    model = tiny_model(name).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (shard == "20KB")
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()

    program = capture_directory(tmp_path)

    ids, mask = tokens(2, 9, (0, 3))
    expected = expected_logits(loaded, ids, mask)
    assert relative_error(program(ids, mask).logits, expected, mask) <= TOLERANCE
