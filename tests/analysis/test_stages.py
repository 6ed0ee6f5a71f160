"""Stages: where a program is cut, and that its parts add up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from tests.work import function_calls
from torch import Tensor, nn

from qcompile.analysis.stages import Stage, stages
from qcompile.frontends.huggingface import capture_model
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.passes.infra import PassManager, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.pipeline import front_phases

LAYERS = 3
TIED: dict[str, Any] = {"tie_word_embeddings": True}

_TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@cache
def _captured(architecture: str, options: tuple[tuple[str, Any], ...]) -> list[Program]:
    transformers = pytest.importorskip("transformers")
    configuration = transformers.AutoConfig.for_model(architecture, **{**_TINY, **dict(options)})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration).eval()
    forms = [capture_model(model)]
    PassManager(front_phases(), on_phase=lambda _, program: forms.append(program)).run(forms[0])
    return forms


def _capture(architecture: str, **config: Any) -> list[Program]:
    """A tiny model as captured, canonical and raised."""
    return _captured(architecture, tuple(config.items()))


class Encoder(nn.Module):
    """Post-norm attention and feed-forward layers over tokens, with a pooler."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(30, 8), nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(8, 8) for name in ("query", "key", "value", "out", "up", "down")}
                | {name: nn.LayerNorm(8) for name in ("after_attention", "after_feed_forward")}
            )
            for _ in range(layers)
        )
        self.pooler = nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        bias = torch.where(mask[:, None, :] != 0, 0.0, -1e4)
        x = self.norm(self.tokens(ids) + self.positions(torch.arange(ids.shape[1])))
        for layer in self.layers:
            scores = layer["query"](x) @ layer["key"](x).transpose(1, 2) + bias
            attended = torch.softmax(scores, -1) @ layer["value"](x)
            x = layer["after_attention"](x + layer["out"](attended))
            fed = layer["down"](torch.relu(layer["up"](x)))
            x = layer["after_feed_forward"](x + fed)
        return x, torch.tanh(self.pooler(x[:, 0]))


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        )


class Residual(nn.Module):
    """A chain of pre-norm residual blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(layers))
        self.ups = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.downs = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(norm(x))))
        return x


def _run_in_stages(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    """Runs stage by stage, with nothing from outside a stage but its declared inputs."""
    interpreter = Interpreter(program)
    values: dict[Any, Any] = dict(zip(program.inputs, inputs, strict=True))
    with torch.no_grad():
        for stage in stages(program):
            interpreter.env = {node: values[node] for node in stage.inputs}
            for node in stage.nodes:
                interpreter.env[node] = interpreter.run_node(node)
            values |= {node: interpreter.env[node] for node in stage.outputs}
    return [values[node] for node in program.results]


def _blocks(found: list[Stage]) -> list[int]:
    return [stage.block for stage in found if stage.block is not None]


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", TIED),
        ("gpt_neox", {"use_parallel_residual": True}),
    ],
    ids=["llama", "parallel_residual"],
)
def test_every_layer_is_a_stage(architecture: str, config: dict[str, Any]) -> None:
    for program in _capture(architecture, **config):
        found = stages(program)
        assert _blocks(found) == [0, 1]
        layers = [stage for stage in found if stage.block is not None]
        # Each layer has weights of its own, all of them and no others.
        assert len({name for stage in layers for name in stage.weights}) == sum(
            len(set(stage.weights)) for stage in layers
        )
        assert all(stage.boundary is not None for stage in layers)
        for number, stage in enumerate(layers):
            named = [name for name in stage.weights if ".layers." in name]
            assert named
            assert all(f".{number}." in name for name in named)


def test_encoder_layer_with_both_halves_is_a_stage() -> None:
    inputs = [torch.arange(10).reshape(2, 5), torch.ones(2, 5, dtype=torch.int64)]
    inputs[1][0, 3:] = 0
    program = capture_module(Encoder(LAYERS), tuple(inputs))
    found = stages(program)
    # The mask and the sizes; embeddings and their norm; the layers; the pooler.
    assert [stage.block for stage in found] == [None, None, 0, 1, 2, None]
    assert [len(stage.weights) for stage in found] == [0, 4, 16, 16, 16, 2]
    results = _run_in_stages(program, inputs)
    assert all(map(torch.equal, results, Interpreter(program).run(*inputs)))


@pytest.mark.parametrize("past", [0, 3])
def test_stages_in_order_compute_what_the_program_does(past: int) -> None:
    for program in _capture("llama", **TIED):
        ids = torch.arange(10).reshape(2, 5)
        cache = tuple(torch.randn(2, 1, past, 16) for _ in range(4))
        inputs = program.bind(ids, past_key_values=cache)
        expected = Interpreter(program).run(*inputs)
        for one, other in zip(_run_in_stages(program, inputs), expected, strict=True):
            assert torch.equal(one, other)


def test_quantized_layers_are_stages_with_their_codes() -> None:
    program = run_passes(
        _capture("llama", **TIED)[-1],
        [QuantizeWeights("int4-g16"), QuantizeActivations()],
    )
    found = stages(program)
    assert _blocks(found) == [0, 1]
    layers = [stage for stage in found if stage.block is not None]
    assert len({len(stage.weights) for stage in layers}) == 1
    inputs = program.bind(torch.arange(6).reshape(2, 3))
    expected = Interpreter(program).run(*inputs)
    assert all(map(torch.equal, _run_in_stages(program, inputs), expected))


def test_tied_table_is_a_weight_of_both_stages_that_read_it() -> None:
    found = stages(_capture("llama", **TIED)[-1])
    readers = [stage for stage in found if "model.embed_tokens.weight" in stage.weights]
    assert [stage.block for stage in readers] == [None, None]
    assert readers[-1] is found[-1]


def test_shared_values_are_computed_once_in_the_first_stage() -> None:
    first, *rest = stages(_capture("llama", **TIED)[-1])
    assert first.boundary is None
    assert first.weights == ("model.rotary_emb.inv_freq",)
    calls = [node for stage in (first, *rest) for node in stage.nodes if node.op != "get_attr"]
    assert len(calls) == len(set(calls))


def test_convolutions_are_stages_with_what_follows_them() -> None:
    found = stages(capture_module(ConvNet(), torch.randn(2, 3, 12, 12)))
    calls = [[n.name for n in stage.nodes if n.op == "call_function"] for stage in found]
    assert calls == [
        ["conv2d", "relu"],
        ["conv2d_1", "relu_1"],
        ["adaptive_avg_pool2d", "flatten", "linear"],
    ]
    assert [stage.block for stage in found] == [0, 1, None]


def test_program_without_repetition_is_one_stage() -> None:
    class Skips(nn.Module):
        """Every value is still needed at the end."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            z = self.b(y)
            return x + y + z

    program = capture_module(Skips(), torch.randn(3, 4))
    (only,) = stages(program)
    assert only.block is None
    assert only.inputs == tuple(program.inputs)
    assert only.outputs == tuple(program.results)


def test_side_result_belongs_to_the_stage_that_can_compute_it_first() -> None:
    class TwoHeads(Residual):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            early = x
            for i, (norm, up, down) in enumerate(
                zip(self.norms, self.ups, self.downs, strict=True)
            ):
                x = x + down(torch.relu(up(norm(x))))
                early = x.sum(-1) if i == 0 else early
            return early, x

    program = capture_module(TwoHeads(3), torch.randn(2, 8))
    found = stages(program)
    assert _blocks(found) == [0, 1, 2]
    early = program.results[0]
    assert early in found[1].outputs or early in found[0].outputs
    inputs = [torch.randn(2, 8)]
    assert all(map(torch.equal, _run_in_stages(program, inputs), Interpreter(program).run(*inputs)))


def test_deep_program_is_cut_in_linear_time() -> None:
    programs = [capture_module(Residual(depth), torch.randn(2, 8)) for depth in (10, 20, 40)]
    assert len(stages(programs[-1])) == 40
    few, twice, four_times = [function_calls(partial(stages, each)) for each in programs]
    assert four_times - twice < 2.1 * (twice - few)


def test_dead_nodes_belong_to_no_stage() -> None:
    program = capture_module(Residual(2), torch.randn(2, 8))
    make: Callable[..., Any] = program.graph.call_function
    with program.graph.inserting_before(program.output_node):
        dead = make(torch.ops.aten.neg.default, (program.results[0],))
        dead.meta["val"] = program.results[0].meta["val"]
    assert all(dead not in stage.nodes for stage in stages(program))
