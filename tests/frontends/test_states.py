"""Decoders with states of fixed size are captured with them, and decode what transformers does."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from tests.frontends.tiny_models import (
    STATES,
    TOLERANCE,
    VOCABULARY,
    decoded_logits,
    expected_logits,
    raised_tiny_model,
    relative_error,
    tokens,
)
from torch import Tensor, nn

from qcompile.errors import ModelError
from qcompile.frontends.huggingface import capture_model
from qcompile.frontends.traced_cache import plan_cache
from qcompile.ir.program import Program
from qcompile.ir.types import Role

FAST = ("lfm2", "mamba2")
NAMES = [
    *FAST,
    *(pytest.param(name, marks=pytest.mark.slow) for name in STATES if name not in FAST),
]


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_decoding_equal_the_whole_text(name: str) -> None:
    """A batch with left padding: the whole, in three parts, and token by token."""
    model, program = raised_tiny_model(name)
    ids, mask = tokens(3, 9, (2, 0, 5))
    expected = expected_logits(model, ids, mask)

    assert program.signature.is_causal_lm
    assert program.signature.has(Role.PAST_STATE)
    assert relative_error(program(ids, mask).logits, expected, mask) <= TOLERANCE
    for cuts in ((4, 7), tuple(range(6, 9)), tuple(range(1, 9))):
        found = decoded_logits(program, ids, mask, cuts)
        assert relative_error(found, expected, mask) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_equals_that_of_transformers(name: str) -> None:
    model, program = raised_tiny_model(name)
    ids, mask = tokens(2, 7, (0, 3))

    expected = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )

    assert greedy(program, ids, mask, 5).tolist() == expected.tolist()


def greedy(program: Program, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    past, text = None, ids
    for _ in range(count):
        output = program(ids, mask, past_key_values=past)
        past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
        text = torch.cat((text, ids), dim=1)
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    return text


def test_states_have_stable_names_and_start_as_zeros() -> None:
    program = raised_tiny_model("lfm2")[1]

    names = {port.role: port.name for port in program.signature.inputs if port.layer == 0}
    assert names == {Role.PAST_STATE: "past_key_values.0.conv_states.0"}
    names = {port.role: port.name for port in program.signature.outputs if port.layer == 0}
    assert names == {Role.PRESENT_STATE: "present.0.conv_states.0"}
    place = [port.role for port in program.signature.inputs].index(Role.PAST_STATE)
    state = program.bind(torch.ones(3, 2, dtype=torch.int64))[place]
    assert state.shape == (3, 32, 3)
    assert not state.any()


class Keeps(nn.Module):
    """A model whose cache holds what `make` gives for a batch and a length."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self._make = make

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True
    ) -> Any:
        del past_key_values, use_cache
        cache: Any = transformers.DynamicCache()
        cache.kept = self._make(*input_ids.shape)
        return transformers.modeling_outputs.CausalLMOutputWithPast(past_key_values=cache)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda batch, length: [torch.zeros(batch, length)], "changes with the text"),
        (lambda batch, length: [torch.zeros(4, batch)], "not one for each row"),
        (lambda batch, length: [torch.zeros(batch, 4), length], "counts tokens"),
        (lambda batch, length: [torch.zeros(batch, 4)] * (length - 4), "depends on the text"),
        (lambda batch, length: [], "holds nothing"),
    ],
)
def test_cache_that_cannot_be_followed_is_refused_with_its_reason(make: Any, reason: str) -> None:
    model: Any = Keeps(make)
    with pytest.raises(ModelError, match=reason):
        plan_cache(model)


def test_states_alone_do_not_tell_the_past() -> None:
    program = raised_tiny_model("mamba2")[1]
    token = torch.ones(1, 1, dtype=torch.int64)
    cache = program(token).past_key_values

    assert not program.signature.has(Role.PAST_KEY)
    with pytest.raises(ModelError, match="pass attention_mask"):
        program(token, past_key_values=cache)


def test_functions_of_transformers_are_put_back_after_the_trace() -> None:
    model, _ = raised_tiny_model("lfm2")
    namespace = vars(sys.modules[type(model).__module__])

    assert namespace["causal_conv1d_fn"].__module__ == type(model).__module__


def test_loop_over_the_text_is_named_as_the_reason() -> None:
    config = transformers.RecurrentGemmaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        lru_width=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        block_types=["recurrent"],
    )
    with pytest.raises(ModelError, match="loops over its text in Python"):
        capture_model(transformers.RecurrentGemmaForCausalLM(config))
