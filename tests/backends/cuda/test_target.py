"""The `cuda` target end to end: lowered, packed, loaded, run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompile as qc
from qcompile.artifact import Artifact
from qcompile.backends.cuda import ops
from qcompile.backends.cuda.lower.fuse_quantized import FuseQuantized
from qcompile.backends.cuda.lower.round_operands import RoundOperands
from qcompile.backends.cuda.target import CudaTarget
from qcompile.backends.registry import get_target
from qcompile.errors import ArtifactError, MissingExtraError, RecipeError, TargetError
from qcompile.formats import parse_format
from qcompile.frontends.torch_export import capture_module
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.ir.serialize import load_program
from qcompile.manifest import MANIFEST_NAME
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Context, run_passes
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.progress import NullProgress

aten = torch.ops.aten

# Logits of about 10 out of two layers of float32 sums, added in another order.
assert_close = partial(torch.testing.assert_close, rtol=0, atol=5e-5)


def relative(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max())


# --- lowering -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is a linear layer too, and a float layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(24, 20)
        self.middle = nn.Linear(20, 20)
        self.head = nn.Linear(20, 24, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.table(ids)))


@pytest.fixture(scope="module")
def tied() -> Program:
    torch.manual_seed(0)
    program = canonicalize(capture_module(Tied(), torch.zeros(2, 5, dtype=torch.int64)))
    passes = [QuantizeWeights("int4-g8-asym", embedding="int4-g8-asym", ignore=["middle*"])]
    return run_passes(program, passes)


def test_quantized_layers_become_one_node_each_over_one_packed_weight(tied: Program) -> None:
    lowered = run_passes(tied, [FuseQuantized()])
    parts = ("codes.packed", "scale.transposed", "zero_point.transposed")
    weight = ", ".join(f"@table.weight.{part}" for part in parts)
    assert lowered.text() == (
        "program(%ids: i64[s0, s1]) {canonical, weights_quantized}\n"
        f"  %0: f32[s0, s1, 20] = qc.quantized_embedding(%ids, {weight}, 20, 4, 8)\n"
        "  %1: f32[s0, s1, 20] = aten.linear(%0, @middle.weight, @middle.bias)\n"
        f"  %2: f32[s0, s1, 24] = qc.quantized_linear(%1, {weight}, None, 20, 4, 8, none)\n"
        "  return %2\n"
    )


def test_fused_layers_compute_the_same_in_float64(tied: Program) -> None:
    ids = torch.tensor([[0, 23, 5]])
    (expected,) = Interpreter(tied, dtype=torch.float64).run(ids)
    lowered = run_passes(tied, [FuseQuantized()])
    lowered.verify(shapes=True)
    (found,) = Interpreter(lowered, dtype=torch.float64).run(ids)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("rounding", "bound"), [("none", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)]
)
def test_rounding_changes_results_by_its_own_precision(
    tied: Program, rounding: str, bound: float
) -> None:
    ids = torch.arange(24).reshape(1, 24)
    lowered = CudaTarget(rounding).lower(tied, Context())
    error = relative(lowered(ids), tied(ids))
    assert bound / 1000 < error + 1e-7 < bound
    assert {node.args[-1] for node in lowered.calls(ops.linear)} == {rounding}


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(TargetError, match="'float8'"):
        RoundOperands("float8")


def test_lowering_leaves_the_program_as_it_was(quantized: Program) -> None:
    before = quantized.text()
    CudaTarget().lower(quantized, Context())
    assert quantized.text() == before


def test_language_model_is_lowered_to_kernels(quantized: Program) -> None:
    lowered = CudaTarget().lower(quantized, Context())
    lowered.verify(shapes=True)
    text = lowered.text()
    # q, k, v, o, gate, up and down of two layers, and the head.
    assert text.count("qc.quantized_linear(") == 15
    assert text.count("qc.quantized_embedding(") == 1
    assert "aten.linear(" not in text
    assert "aten.embedding(" not in text
    assert "%logit_positions" in text


# --- what the target says -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["int1-asym", "int2-g32", "int3", "int5-g7", "int8-g64-bf16", "int4-asym16"]
)
def test_every_integer_format_is_supported(name: str) -> None:
    capabilities = CudaTarget().capabilities
    assert capabilities.weight_format(parse_format(name)) is None
    assert capabilities.embedding_format(parse_format(name)) is None


def test_call_that_cannot_be_saved_is_found_before_any_work(tied: Program) -> None:
    program = tied.copy()
    node = next(program.calls(aten.linear.default))
    assert CudaTarget().check(program) == []
    node.target = aten.rand_like.default
    (finding,) = CudaTarget().check(program)
    assert finding.layer == node.name
    assert "aten.rand_like" in finding.reason


def test_registry_knows_the_target() -> None:
    assert get_target("cuda").name == "cuda"


def test_predicted_sizes_are_those_of_the_files(quantized: Program, tmp_path: Path) -> None:
    target = CudaTarget()
    lowered = target.lower(quantized, Context())
    packed = target.pack(lowered, tmp_path, NullProgress())
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert target.predict_files(lowered) == sizes
    codes = {
        n: b for n, b in packed.tensor_bytes.items() if n.endswith("gate_proj.weight.codes.packed")
    }
    # 48 rows of 32 columns: one block of 32 bytes a row.
    assert list(codes.values()) == [48 * 32] * 2


# --- the artifact ---------------------------------------------------------------------------------

RECIPE = {
    "name": "mixed",
    "steps": [
        {"quantize_weights": {"format": "int4-g12-asym", "embedding": "int4-g12-asym"}},
        {"quantize_activations": {"format": "int8"}},
    ],
}


@pytest.fixture(scope="session")
def artifact(captured: Program, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("cuda") / "model"
    return qc.compile(captured, RECIPE, target="cuda", output=output)


def test_artifact_holds_data_and_the_usual_files(artifact: Artifact) -> None:
    manifest = artifact.manifest
    names = {"program.json", "weights.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names <= manifest.files.keys()
    assert (manifest.target, manifest.task) == ("cuda", "causal_lm")
    assert manifest.kernel_layout_version == 1
    shapes = {value.name: value.shape for value in manifest.signature.inputs}
    assert shapes["input_ids"] == ("batch", "query")
    assert shapes["past_key_values.0.key"] == ("batch", 2, "past", 8)
    assert shapes["attention_mask"] in {("batch", "past + query"), ("batch", "query + past")}


def test_forward_is_the_quantized_program_up_to_half_precision(
    artifact: Artifact, quantized: Program, ids: Tensor
) -> None:
    logits = artifact.forward(ids)
    assert (logits.dtype, logits.shape) == (np.float32, (2, 7, 260))
    # int8 activations may round to a neighbour where half precision moves them.
    assert relative(logits, quantized(ids).logits) < 3e-2


def test_forward_without_rounding_is_the_quantized_program(
    quantized: Program, tmp_path: Path, ids: Tensor
) -> None:
    target = CudaTarget("none")
    lowered = target.lower(quantized, Context())
    target.pack(lowered, tmp_path, NullProgress())
    loaded = load_program(tmp_path)
    inputs = [*quantized.bind(ids), torch.arange(ids.shape[1])]
    found = Interpreter(loaded).run(*inputs)
    assert_close(found[0], quantized(ids).logits)


def test_forward_in_chunks_is_forward_at_once(
    artifact: Artifact, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = artifact.forward(ids)
    monkeypatch.setattr("qcompile.backends.decoding.PREFILL_CHUNK", 3)
    assert_close(torch.as_tensor(artifact.forward(ids)), torch.as_tensor(whole))


def test_padding_does_not_change_the_other_positions(artifact: Artifact, ids: Tensor) -> None:
    whole = artifact.forward(ids)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    found = artifact.forward(padded, mask)
    assert_close(torch.as_tensor(found[:, 3:]), torch.as_tensor(whole))


def test_decoder_continues_what_it_holds(artifact: Artifact, ids: Tensor) -> None:
    decoder = artifact._session.decoder(2, 16)
    tokens = ids.numpy()
    decoder.advance(tokens[:, :4])
    for column in range(4, 7):
        logits = decoder.advance(tokens[:, column : column + 1])
    assert_close(torch.as_tensor(logits), torch.as_tensor(artifact.forward(ids)[:, -1]))


def test_generation_is_greedy_decoding_of_the_program(
    artifact: Artifact, quantized: Program
) -> None:
    lowered = Interpreter(CudaTarget().lower(quantized, Context()))
    tokens = [5, 7, 9]
    (completion,) = artifact.complete(tokens, max_new_tokens=6)
    for token in completion.token_ids:
        inputs = [*quantized.bind(torch.tensor([tokens])), torch.tensor([len(tokens) - 1])]
        assert int(lowered.run(*inputs)[0].argmax()) == token
        tokens.append(token)
    assert len(completion.token_ids) == 6 or completion.finish_reason == "stop"


def test_batch_of_prompts_generates_what_each_does_alone(artifact: Artifact) -> None:
    prompts = ["a few words", "one"]
    together = artifact.generate(prompts, max_new_tokens=4)
    assert together == [artifact.generate(prompt, max_new_tokens=4) for prompt in prompts]


def test_run_takes_the_cache_by_name(artifact: Artifact, ids: Tensor) -> None:
    inputs: dict[str, Any] = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((2, 7), np.int64),
        "position_ids": np.arange(7)[None].repeat(2, 0),
        "logit_positions": np.array([6]),
    }
    for value in artifact.manifest.signature.inputs:
        if value.role.startswith("past"):
            inputs[value.name] = np.empty((2, 2, 0, 8), np.float32)
    outputs = artifact.run(inputs)
    assert outputs["present.0.key"].shape == (2, 2, 7, 8)
    whole = artifact.forward(ids)[:, -1:]
    assert_close(torch.as_tensor(outputs["logits"]), torch.as_tensor(whole))
    inputs["attention_mask"] = np.ones((2, 9), np.int64)
    with pytest.raises(RecipeError, match=r"attention_mask \[2, 9\]"):
        artifact.run(inputs)
    del inputs["position_ids"]
    with pytest.raises(RecipeError, match="'position_ids' is missing"):
        artifact.run(inputs)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_ids": [[5, 260]]}, "token id 260"),
        ({"input_ids": [5, 6]}, r"\[2\]"),
        ({"input_ids": [[0.5]]}, "float64"),
        ({"input_ids": [[5]], "attention_mask": [[1, 1]]}, "attention_mask"),
        ({"input_ids": [[5]], "token_type_ids": [[1]]}, "takes no token_type_ids"),
        ({"input_ids": [[5] * 129]}, "129 tokens"),
    ],
)
def test_forward_names_the_bad_argument(
    artifact: Artifact, arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError, match=named):
        artifact.forward(**arguments)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m["signature"]["inputs"][0].update(name="tokens"), "names other inputs"),
        (lambda m: m["signature"]["outputs"][0].update(shape=["a", "b", 7]), "'logits' as logits"),
        (lambda m: m["signature"]["inputs"][3].update(layer=1), "'past_key_values.0.key'"),
        (lambda m: m.update(kernel_layout_version=2), "kernel layout 2"),
    ],
)
def test_manifest_that_does_not_fit_the_program_is_refused(
    artifact: Artifact, tmp_path: Path, change: Any, named: str
) -> None:
    for path in artifact.path.iterdir():
        (tmp_path / path.name).symlink_to(path)
    manifest = json.loads((artifact.path / MANIFEST_NAME).read_text())
    change(manifest)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=named):
        qc.load(tmp_path, verify=False)


def test_module_without_tokens_maps_inputs_to_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(4, 32)
    artifact = qc.compile(
        module,
        {"name": "w8", "steps": [{"quantize_weights": {"format": "int8"}}]},
        target="cuda",
        output=tmp_path / "module",
        example_inputs=x,
    )
    (name,) = (value.name for value in artifact.manifest.signature.inputs)
    (found,) = artifact.run({name: x.numpy()}).values()
    assert relative(found, module(x).detach()) < 2e-2
    with pytest.raises(RecipeError, match="no logits"):
        artifact.forward([[1]])
    with pytest.raises(RecipeError, match="cannot generate"):
        artifact._session.decoder(1, 1)


def test_missing_triton_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "qcompile.kernels.triton.quantized_linear", raising=False)
    x, scale = torch.randn(1, 32), torch.ones(1, 1)
    packed = torch.zeros(1, 1, 32, dtype=torch.uint8)
    with pytest.raises(MissingExtraError, match=r"(?s)'triton'.*qcompile\[cuda\]"):
        ops.triton_linear(x, packed, scale, None, None, 32, 8, 0, "none")


_PROGRAM = """
import sys
import numpy as np
import qcompile as qc
from qcompile.kernels.triton import quantized_linear as kernel

calls = []
original = kernel.quantized_linear
kernel.quantized_linear = lambda *arguments: (calls.append(1), original(*arguments))[1]
artifact = qc.load(sys.argv[1])
ids = np.load(sys.argv[2])
logits = artifact.forward(ids)
count = len(calls)
(completion,) = artifact.complete(ids[0], max_new_tokens=1)
assert kernel.INTERPRETED
np.savez(sys.argv[3], logits=logits, calls=count, tokens=completion.token_ids)
"""


def test_artifact_on_interpreted_triton_is_the_lowered_program(
    artifact: Artifact, tmp_path: Path, ids: Tensor
) -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install 'qcompile[cuda]'")
    np.save(tmp_path / "ids.npy", ids.numpy())
    paths = [str(artifact.path), str(tmp_path / "ids.npy"), str(tmp_path / "out.npz")]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *paths],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    assert found["calls"] == 15
    # The same rounded products; int8 activations may round to a neighbour.
    assert relative(found["logits"], artifact.forward(ids)) < 1e-3
    (completion,) = artifact.complete(ids[0].numpy(), max_new_tokens=1)
    assert found["tokens"].tolist() == list(completion.token_ids)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_artifact_on_a_gpu_is_the_artifact_on_the_cpu(artifact: Artifact, ids: Tensor) -> None:
    from qcompile.backends.cuda.runtime import CudaSession

    session = CudaSession(artifact.path, artifact.manifest, device="cpu")
    assert relative(artifact.forward(ids), session.forward(ids)) < 1e-2
