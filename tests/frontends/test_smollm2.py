"""The small real model, from its GGUF file, computes and generates what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.frontends.open import capture_path
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.types import ProgramOutput
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.raise_ops import raise_program

pytestmark = pytest.mark.slow

NEW_TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):",
    "Water boils at",
    "The three laws of robotics are",
)


class Runner:
    """Interprets a program with its weights decoded once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.weights: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> ProgramOutput:
        run = Interpreter(self.program, cache=self.weights).run
        return ProgramOutput(run(*self.program.bind(*args, **kwargs)))


@pytest.fixture(scope="module")
def runner(smollm2_gguf: Path) -> Runner:
    program = raise_program(canonicalize(capture_path(smollm2_gguf)))
    program.verify()
    return Runner(program)


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> tuple[Any, Any]:
    # What from_pretrained(gguf_file=...) does, which also asks for the package accelerate.
    transformers = pytest.importorskip("transformers")
    tables = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    where = {"pretrained_model_name_or_path": str(smollm2_gguf.parent)}
    file = {"gguf_file": smollm2_gguf.name}
    config = transformers.AutoConfig.from_pretrained(**where, **file)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = tables.load_gguf_checkpoint(
        str(smollm2_gguf), return_tensors=True, model_to_load=model
    )
    missing, unexpected = model.load_state_dict(loaded["tensors"], strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model, transformers.AutoTokenizer.from_pretrained(**where, **file)


def test_smollm2_logits_equal_transformers(runner: Runner, reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).logits
    found = runner(ids).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_smollm2_raises_every_layer(runner: Runner) -> None:
    calls = runner.program.calls
    assert len(list(calls(torch.ops.qc.attention.default))) == 30
    assert len(list(calls(torch.ops.qc.rope.default))) == 60
    assert len(list(calls(torch.ops.qc.rms_norm.default))) == 61
    assert len(list(calls(torch.ops.qc.gated_act.default))) == 30


def test_smollm2_carries_what_generation_needs(runner: Runner) -> None:
    assets = runner.program.provenance.assets
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(assets)
    assert runner.program.provenance.config["vocab_size"] == 49152


@pytest.mark.parametrize("prompt", PROMPTS)
def test_smollm2_greedy_generation_equals_transformers(
    prompt: str, runner: Runner, reference: tuple[Any, Any]
) -> None:
    model, tokenizer = reference
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(
            ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
        )[0]

    tokens, past = ids, None
    for _ in range(NEW_TOKENS):
        mask = torch.ones_like(tokens)
        output = runner(tokens[:, 0 if past is None else -1 :], mask, past_key_values=past)
        logits = output.logits[:, -1]
        logits[:, model.generation_config.eos_token_id] = float("-inf")  # as min_new_tokens does
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
        past = output.past_key_values
    assert tokens[0].tolist() == expected.tolist()
