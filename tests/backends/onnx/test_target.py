"""The `onnx` target end to end: what it writes, what it takes, and that it computes the program."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tests.frontends.tiny_models import raised_tiny_model, tokens
from torch import Tensor, nn

import qcompile as qc
from qcompile.artifact import Artifact
from qcompile.backends.onnx.emitter import OnnxEmitter
from qcompile.backends.onnx.external_data import predict_sizes
from qcompile.backends.onnx.stored import pack_nibbles, pack_rows
from qcompile.backends.onnx.target import OnnxTarget
from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.errors import RecipeError, TargetError
from qcompile.formats import IntegerFormat
from qcompile.formats.base import Format
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Context, Pass, PassManager, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.progress import NullProgress

EXACT = 1e-5
"""Of max |difference| over max |value|: float32 sums in other orders."""


def relative(found: Any, expected: Any) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).abs().max() / expected.abs().max())


def write(program: Program, directory: Path, **options: Any) -> onnx.ModelProto:
    """The model that the target writes, checked."""
    target = OnnxTarget(**options)
    target.pack(target.lower(program, Context()), directory, NullProgress())
    path = directory / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def session(directory: Path, **entries: str) -> onnxruntime.InferenceSession:
    """Plain ONNX Runtime, exact: by default it rounds activations of fused low-bit weights."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    for name, value in entries.items():
        setattr(options, name, value)
    path = directory / "model.onnx"
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(directory: Path, *inputs: Tensor) -> list[np.ndarray]:
    runtime = session(directory)
    names = [value.name for value in runtime.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    found: list[np.ndarray] = runtime.run(None, feeds)
    return found


def operators(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


# --- layers and formats ---------------------------------------------------------------------------


class Tied(nn.Module):
    """A table of `n` rows that is looked up and multiplied with."""

    def __init__(self, n: int = 21, k: int = 40) -> None:
        super().__init__()
        self.table = nn.Embedding(n, k)
        self.head = nn.Linear(k, n)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.table(ids))


def capture(module: nn.Module, *inputs: Tensor) -> Program:
    return canonicalize(capture_module(module, inputs))


@pytest.fixture(scope="module")
def tied() -> Program:
    torch.manual_seed(0)
    return capture(Tied(), torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("activations", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        *("int1-asym", "int2-g8", "int3-g16-asym", "int4", "int4-g16", "int4-g12-asym-bf16"),
        *("int4-g64", "int5-g8", "int6-asym", "int7-fp32", "int8", "int8-asym", "int8-g16-fp32"),
        *("ternary", "ternary-g16-bf16", "fp4-g12", "e3m2-g8", "fp8", "e5m2-g16", "nf4-g16"),
        *("nf4-g16-dq", "mxfp4", "mxfp6", "mxfp8", "nvfp4", "(-1.5,-0.5,0.5,1.5)-g8"),
    ],
)
def test_every_format_is_exact(tied: Program, tmp_path: Path, name: str, activations: bool) -> None:
    """Rows of 40 in groups of 12 and 16 end in short ones; 21 columns make nibbles odd."""
    passes: list[Pass] = [QuantizeWeights(name, embedding=name, lm_head=name)]
    program = run_passes(tied, [*passes, *([QuantizeActivations()] if activations else [])])
    write(program, tmp_path)
    ids = torch.tensor([[0, 20, 5, 7]])
    (found,) = run(tmp_path, ids)
    assert relative(found, program(ids)) < EXACT


@pytest.mark.parametrize(
    ("name", "element"),
    [
        ("ternary-g16", "INT4"),
        ("fp4-g16", "INT8"),
        ("fp8", "FLOAT8E4M3FN"),
        ("e5m2-g16", "FLOAT8E5M2"),
    ],
)
def test_levels_that_have_an_element_are_decoded_like_integers(
    tied: Program, tmp_path: Path, name: str, element: str
) -> None:
    model = write(run_passes(tied, [QuantizeWeights(name, lm_head=name)]), tmp_path)
    nodes = {node.op_type: node for node in model.graph.node}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    codes, *_ = nodes["DequantizeLinear"].input
    assert onnx.TensorProto.DataType.Name(types[codes]) == element


def test_weights_are_decoded_in_blocks_right_before_their_product(
    tied: Program, tmp_path: Path
) -> None:
    program = run_passes(tied, [QuantizeWeights("int4-g16-asym", embedding="int4-g16-asym")])
    model = write(program, tmp_path)
    nodes = {node.op_type: node for node in model.graph.node}
    decode, product = nodes["DequantizeLinear"], nodes["MatMul"]
    assert decode.output[0] == product.input[1]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in decode.attribute}
    assert attributes == {"axis": 0, "block_size": 16}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    codes, zero_point = tensors[decode.input[0]], tensors[decode.input[2]]
    assert (codes.data_type, list(codes.dims)) == (onnx.TensorProto.UINT4, [40, 21])
    assert (zero_point.data_type, list(zero_point.dims)) == (onnx.TensorProto.UINT4, [3, 21])
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize(
    ("name", "matrix", "rows"),
    [
        ("int1-asym", 40 * 21 // 2, 21 * 5),
        ("int2-g8", 40 * 21 // 2, 21 * 10),
        ("int3-g16", 40 * 21 // 2, 21 * 20),
        ("int4-g16", 40 * 21 // 2, 21 * 20),
        ("int6-g16", 40 * 21, 21 * 40),
        ("int8", 40 * 21, 21 * 40),
        ("ternary-g16", 40 * 21 // 2, 21 * 10),
        ("nf4-g16", 40 * 21 // 2, 21 * 20),
        ("fp4-g16", 40 * 21, 21 * 20),
        ("fp8", 40 * 21, 21 * 40),
    ],
)
def test_codes_take_the_bytes_of_their_container(
    tied: Program, tmp_path: Path, name: str, matrix: int, rows: int
) -> None:
    target = OnnxTarget()
    program = run_passes(tied, [QuantizeWeights(name, embedding=name, lm_head=name)])
    packed = target.pack(program, tmp_path, NullProgress())
    codes = [size for key, size in packed.tensor_bytes.items() if ".codes" in key]
    assert sorted(codes) == sorted([matrix, rows])
    assert any("table.weight is stored 2 times" in note for note in packed.notes)
    wider = [note for note in packed.notes if "-bit elements" in note]
    own_size = name in ("int4-g16", "int8", "fp8", "nf4-g16")
    assert wider == [] if own_size else name in wider[0]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert target.predict_files(program) == sizes


def test_nibbles_begin_in_the_low_half() -> None:
    assert pack_nibbles(torch.tensor([[1, 2], [15, 0], [9, 9]]), 0).tolist() == [0x21, 0x0F, 0x99]
    assert pack_nibbles(torch.tensor([7, 8, 0]), 8).tolist() == [0x0F, 0x08]


def test_rows_are_cut_into_parts_that_share_bytes() -> None:
    codes = torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8)
    # Two bytes: columns 0 and 1 in the low bits, then 2 and 3, then 4.
    assert pack_rows(codes, 2).tolist() == [[1 | 3 << 2 | 1 << 4, 2]]


@pytest.mark.parametrize(
    ("name", "fuses"),
    [
        *((f"int4-g{group}", True) for group in (16, 32, 64, 128, 256)),
        ("int4", True),
        ("int4-g64-asym", True),
        ("int4-g48", False),
    ],
)
def test_groups_that_onnxruntime_fuses(tmp_path: Path, name: str, fuses: bool) -> None:
    torch.manual_seed(0)
    program = capture(nn.Linear(512, 32), torch.randn(2, 512))
    write(run_passes(program, [QuantizeWeights(name)]), tmp_path)
    optimized = tmp_path / "optimized.onnx"
    session(tmp_path, optimized_model_filepath=str(optimized))
    found = operators(onnx.load(optimized))
    assert ("MatMulNBits" in found) == fuses


def test_int8_by_int8_is_multiplied_as_integers(tied: Program, tmp_path: Path) -> None:
    program = run_passes(
        tied, [QuantizeWeights("int8", embedding="int8", lm_head="int8"), QuantizeActivations()]
    )
    found = operators(write(program, tmp_path))
    assert found.count("MatMulInteger") == 1
    assert "MatMul" not in found


def test_layers_that_share_an_input_round_it_once(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    torch.manual_seed(0)
    x = torch.randn(3, 16)
    program = run_passes(capture(Pair(), x), [QuantizeWeights("int8"), QuantizeActivations()])
    found = Counter(operators(write(program, tmp_path)))
    assert (found["MatMulInteger"], found["Round"]) == (2, 1)
    assert relative(run(tmp_path, x)[0], program(x)) < EXACT


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("name", "pair"),
    [
        *(("int8", True), ("int8-asym", True), ("int6", True), ("int4-g16", False)),
        *(("int8-g8", False), ("fp8", False), ("fp4-g8", False), ("nf4-g8", False)),
    ],
)
def test_stored_activation_scales_become_quantize_and_dequantize(
    tmp_path: Path, name: str, pair: bool, symmetric: bool
) -> None:
    """Values far outside of the range land on its last code, which is -127 and not -128.

    The pair stands only before weights that ONNX Runtime multiplies rightly with it.
    """
    torch.manual_seed(0)
    program = run_passes(capture(nn.Linear(16, 8), torch.randn(4, 16)), [QuantizeWeights(name)])
    program = _round_statically(program, symmetric)
    found = operators(write(program, tmp_path))
    decodes = 0 if name.startswith("nf4") else 1
    assert found.count("QuantizeLinear") == 1
    assert found.count("DequantizeLinear") == decodes + pair
    x = torch.cat([torch.randn(3, 16), torch.full((1, 16), -50.0)])
    assert relative(run(tmp_path, x)[0], program(x)) < EXACT


@pytest.mark.parametrize("granularity", ["tensor", "channel", "token"])
def test_activations_of_few_bits_are_exact(tmp_path: Path, granularity: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    program = capture(nn.Linear(16, 8), x)
    context = Context(calibration=Calibration(DataSource(examples=x)))
    passes = [QuantizeWeights("int4"), QuantizeActivations("int4", granularity=granularity)]
    program, _ = PassManager(passes).run(program, context)
    write(program, tmp_path)
    assert relative(run(tmp_path, 2 * x)[0], program(2 * x)) < EXACT


def _round_statically(program: Program, symmetric: bool) -> Program:
    program = program.copy()
    program.weights.put("x.scale", torch.tensor([0.02]))
    program.weights.put("x.zero_point", torch.tensor([100], dtype=torch.uint8))
    editor = Editor(program)
    (linear,) = program.calls(torch.ops.aten.linear.default)
    with editor.before(linear):
        scale = editor.weight("x.scale")
        zero_point = None if symmetric else editor.weight("x.zero_point")
        how = (scale, zero_point, 8, 0)
        codes = editor.call(dialect.quantize, linear.args[0], *how)
        linear.update_arg(0, editor.call(dialect.dequantize, codes, *how))
    return program


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
