"""The `onnx` target end to end: what it takes and refuses, whole models, artifacts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.backends.onnx.written import (
    EXACT,
    capture,
    capture_tied,
    operators,
    relative,
    run,
    session,
    write,
)
from tests.frontends.tiny_models import raised_tiny_model, tokens
from torch import Tensor, nn

import qcompile as qc
from qcompile.artifact import Artifact
from qcompile.backends.onnx.emitter import OnnxEmitter
from qcompile.backends.onnx.external_data import predict_sizes
from qcompile.backends.onnx.target import OnnxTarget
from qcompile.errors import RecipeError, TargetError
from qcompile.formats import IntegerFormat
from qcompile.formats.base import Format
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


@pytest.fixture(scope="module")
def tied() -> Program:
    return capture_tied()


# --- what the target says -------------------------------------------------------------------------


def test_format_that_standard_onnx_lacks_is_refused_by_name() -> None:
    class Odd(IntegerFormat):
        pass

    class Lattice:
        def __str__(self) -> str:
            return "lattice-g8"

    capabilities = OnnxTarget().capabilities
    assert capabilities.weight_format(Odd(3, 8)) is None
    foreign: Format = Lattice()  # type: ignore[assignment]
    assert capabilities.weight_format(foreign) == "standard ONNX has no lattice-g8"


def test_operator_without_a_translation_is_found_before_any_work(tied: Program) -> None:
    program = tied.copy()
    node = next(program.calls(torch.ops.aten.linear.default))
    node.target = torch.ops.aten.linalg_svd.default
    (finding, *_) = OnnxTarget().check(program)
    assert finding.layer == node.name
    assert "linalg_svd" in finding.reason


# --- whole models ---------------------------------------------------------------------------------

FAST = ("llama-tied", "gemma3", "bert")
SLOW = (
    *("mistral", "qwen3", "phi3", "gemma2", "gpt2", "opt", "gpt-neox", "olmo2"),
    *("falcon", "falcon-alibi", "mixtral", "qwen3-moe"),
)


def decode(
    runtime: onnxruntime.InferenceSession,
    program: Program,
    ids: Tensor,
    mask: Tensor,
    cuts: Sequence[int],
) -> Tensor:
    """Logits piece by piece in plain ONNX Runtime, with the cache handed on."""
    names = [value.name for value in runtime.get_inputs()]
    past, pieces, start = None, [], 0
    for end in (*cuts, ids.shape[1]):
        bound = program.bind(ids[:, start:end], mask[:, :end], past_key_values=past)
        feeds = {name: x.numpy() for name, x in zip(names, bound, strict=True)}
        logits, *cache = runtime.run(None, feeds)
        pieces.append(torch.from_numpy(logits))
        past, start = tuple(map(torch.from_numpy, cache)), end
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("opset", [21, 23])
@pytest.mark.parametrize(
    "name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_architecture_computes_the_program(name: str, opset: int, tmp_path: Path) -> None:
    """A batch with left padding, read in three parts over its cache."""
    program = run_passes(
        raised_tiny_model(name)[1],
        [QuantizeWeights("int4-g16", embedding="int4-g16"), QuantizeActivations()],
    )
    model = write(program, tmp_path, opset=opset)
    assert {node.domain for node in model.graph.node} == {""}
    ids, mask = tokens(2, 9, (0, 3))
    cuts = (5, 8) if program.signature.is_causal_lm else ()
    found = decode(session(tmp_path), program, ids, mask, cuts)
    expected = decode_program(program, ids, mask, cuts)
    assert relative(found[mask.bool()], expected[mask.bool()]) < EXACT


def decode_program(program: Program, ids: Tensor, mask: Tensor, cuts: Sequence[int]) -> Tensor:
    past, pieces, start = None, [], 0
    for end in (*cuts, ids.shape[1]):
        logits, *cache = program(ids[:, start:end], mask[:, :end], past_key_values=past)
        pieces.append(logits)
        past, start = tuple(cache), end
    return torch.cat(pieces, dim=1)


def test_opset_23_has_one_operator_for_each_part(tmp_path: Path) -> None:
    program = raised_tiny_model("llama-tied")[1]
    found = Counter(operators(write(program, tmp_path, opset=23)))
    assert (found["Attention"], found["RMSNormalization"], found["RotaryEmbedding"]) == (2, 5, 4)
    assert found["Softmax"] == 0


def test_image_model_computes_the_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(32, 5)
    ).eval()
    program = run_passes(capture(module, torch.randn(2, 3, 8, 8)), [QuantizeWeights("int4-g16")])
    write(program, tmp_path)
    x = torch.randn(3, 3, 8, 8)
    assert relative(run(tmp_path, x)[0], program(x)) < EXACT


# --- fixed shapes ---------------------------------------------------------------------------------


def test_fixed_sizes_leave_no_arithmetic_on_shapes(tmp_path: Path) -> None:
    program = raised_tiny_model("gemma3")[1]
    model = write(program, tmp_path, batch=2, query=4, past=8)
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    assert shapes["input_ids"] == [2, 4]
    assert shapes["attention_mask"] == [2, 12]
    assert shapes["past_key_values.0.key"] == [2, 2, 8, 8]
    assert not {"Shape", "Range", "Size"} & set(operators(model))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"query": 4}, "past is missing"),
        ({"past": 4}, "query is missing"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_sizes_that_cannot_be_fixed_are_refused(options: dict[str, int], named: str) -> None:
    program = raised_tiny_model("llama-tied")[1]
    with pytest.raises(TargetError, match=named):
        OnnxTarget(**options).lower(program, Context())


def test_size_that_a_model_does_not_have_is_refused(tied: Program) -> None:
    with pytest.raises(TargetError, match="no size 'past' that varies"):
        OnnxTarget(past=3).lower(tied, Context())


# --- the artifact ---------------------------------------------------------------------------------

RECIPE = {
    "name": "w4",
    "steps": [{"quantize_weights": {"format": "int4-g16", "embedding": "int4-g16"}}],
}


@pytest.fixture(scope="module")
def captured(tiny_checkpoint: Callable[..., Path]) -> Program:
    return qc.capture(tiny_checkpoint("llama", tie_word_embeddings=True))


@pytest.fixture(scope="module")
def quantized(captured: Program) -> Program:
    return run_passes(captured, [QuantizeWeights("int4-g16", embedding="int4-g16")])


@pytest.fixture(scope="module")
def artifact(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("onnx") / "model"
    return qc.compile(captured, RECIPE, "onnx", output, threads=1, check="off")


@pytest.fixture(scope="module")
def fixed(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("onnx") / "fixed"
    target = "onnx:query=4:past=28"
    return qc.compile(captured, RECIPE, target, output, threads=1, check="off")


def test_artifact_is_the_model_and_the_usual_files(artifact: Artifact) -> None:
    manifest = artifact.manifest
    assert {"model.onnx", "model.onnx.data", "tokenizer.json"} <= manifest.files.keys()
    assert (manifest.target, manifest.kernel_layout_version) == ("onnx", None)
    shapes = {value.name: value.shape for value in manifest.signature.inputs}
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert shapes["input_ids"] == ("batch", "query")
    assert shapes["past_key_values.1.value"] == ("batch", 2, "past", 8)
    assert "logit_positions" not in shapes
    assert any("stored 2 times" in note for note in artifact.report["notes"])
    # Counted twice here, once in the format's own figure.
    bits = manifest.bits
    assert bits["packed_bits_per_weight"] > bits["stored_bits_per_weight"]  # type: ignore[operator]


def test_forward_is_the_program_under_padding(artifact: Artifact, quantized: Program) -> None:
    ids = torch.randint(1, 260, (2, 7), generator=torch.manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = torch.from_numpy(artifact.forward(ids.numpy(), mask.numpy()))
    expected = quantized(ids, mask).logits
    assert relative(found[mask.bool()], expected[mask.bool()]) < EXACT


@pytest.mark.parametrize("kind", ["artifact", "fixed"])
def test_generation_is_greedy_decoding_of_the_program(
    kind: str, quantized: Program, request: pytest.FixtureRequest
) -> None:
    """The fixed model takes 4 tokens at a time: the prompt ends in a part of 2, each step in 1."""
    tokens = [5, 7, 9, 4, 8, 11]
    compiled: Artifact = request.getfixturevalue(kind)
    (completion,) = compiled.complete(list(tokens), max_new_tokens=12)
    for token in completion.token_ids:
        assert int(quantized(torch.tensor([tokens])).logits[0, -1].argmax()) == token
        tokens.append(token)
    assert len(completion.token_ids) == 12 or completion.finish_reason == "stop"


def test_batch_of_prompts_generates_what_each_does_alone(artifact: Artifact) -> None:
    prompts = ["a few words", "one"]
    together = artifact.generate(prompts, max_new_tokens=4)
    assert together == [artifact.generate(prompt, max_new_tokens=4) for prompt in prompts]


def test_fixed_model_reads_what_fits(fixed: Artifact, quantized: Program) -> None:
    ids = torch.randint(1, 260, (1, 31), generator=torch.manual_seed(0))
    assert relative(fixed.forward(ids.numpy()), quantized(ids).logits) < EXACT
    with pytest.raises(RecipeError, match="compiled for 28"):
        fixed.forward(np.ones((1, 36), np.int64))
    with pytest.raises(RecipeError, match=r"1 row\(s\) at a time, not 2"):
        fixed.forward(np.ones((2, 4), np.int64))
    with pytest.raises(RecipeError, match=r"1 row\(s\) at a time, not 2"):
        fixed.generate(["a", "b"], max_new_tokens=1)


# --- large models ---------------------------------------------------------------------------------


def test_model_above_two_gigabytes_is_sound(tmp_path: Path) -> None:
    """The file of the weights is sparse: only its size is real."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(16384, 70000, bias=False)
            self.down = nn.Linear(70000, 16384, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))

    with torch.device("meta"):
        program = capture(Large(), torch.empty(2, 16384))
    graph = OnnxEmitter().emit(program)
    sizes = predict_sizes(graph)
    assert sizes["model.onnx.data"] > 2**33
    assert sizes["model.onnx"] < 2**12
    import onnx_ir

    (tmp_path / "model.onnx").write_bytes(onnx_ir.to_proto(graph.model).SerializeToString())
    os.truncate(_created(tmp_path / "model.onnx.data"), sizes["model.onnx.data"])
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def _created(path: Path) -> Path:
    path.touch()
    return path
