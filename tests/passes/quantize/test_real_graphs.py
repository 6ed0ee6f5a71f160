"""Both passes on a captured transformers model: shapes, generation lengths, figures."""

from dataclasses import replace

import pytest
import torch

from qcompile.frontends.huggingface import capture_model
from qcompile.ir import dialect
from qcompile.ir.types import Fact
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.layers import Part, layer_weights, output_projection
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tiny_checkpoint):
    transformers = pytest.importorskip("transformers")
    directory = tiny_checkpoint("llama", tie_word_embeddings=request.param)
    return transformers.AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def program(model):
    return replace(capture_model(model), facts=frozenset({Fact.CANONICAL}))


def test_parts_are_found_by_dataflow(program, model):
    weights, _ = layer_weights(program)
    parts = {weight.name: weight.parts for weight in weights}
    if model.config.tie_word_embeddings:
        assert parts.pop("model.embed_tokens.weight") == {Part.TOKEN_EMBEDDING, Part.LM_HEAD}
    else:
        assert parts.pop("model.embed_tokens.weight") == {Part.TOKEN_EMBEDDING}
        assert parts.pop("lm_head.weight") == {Part.LM_HEAD}
    assert len(parts) == 2 * 7
    assert set(map(frozenset, parts.values())) == {frozenset({Part.LINEAR})}
    assert output_projection(program) is not None


def test_quantized_program_is_well_formed_and_takes_other_lengths(program):
    after = run_passes(
        program,
        [
            QuantizeWeights("int8-g16", embedding="int8-g16", lm_head="int8-g16"),
            QuantizeActivations(granularity="group"),
        ],
    )
    after.verify(shapes=True)
    # q, k, v share an input, gate and up another; o, down and lm_head have their own.
    assert len(list(after.calls(dialect.dynamic_scale))) == 2 * 4 + 1
    ids = torch.arange(21).reshape(3, 7)
    exact, rounded = program(ids).logits, after(ids).logits
    assert (rounded - exact).norm() / exact.norm() < 0.05
    decoded = after(ids[:, :1], past_key_values=after(ids).past_key_values).logits
    assert decoded.shape == (3, 1, exact.shape[-1])


def test_bits_of_a_tied_model_count_the_table_once(program, model):
    after = run_passes(program, [QuantizeWeights("int4-g16", lm_head="int8", embedding="int8")])
    names = [tensor.name for tensor in count_bits(after).tensors if tensor.format == "int8"]
    expected = ["model.embed_tokens.weight"]
    assert names == (
        expected if model.config.tie_word_embeddings else [*expected, "lm_head.weight"]
    )
