"""Quantized layers in every format: what is stored, how it is multiplied, that it is exact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
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
from torch import Tensor, nn

from qcompile.backends.onnx.stored import pack_nibbles, pack_rows
from qcompile.backends.onnx.target import OnnxTarget
from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.ir import dialect
from qcompile.ir.edit import Editor
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, Pass, PassManager, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.progress import NullProgress


@pytest.fixture(scope="module")
def tied() -> Program:
    return capture_tied()


@pytest.mark.parametrize("activations", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize(
    "name",
    [
        *("int1-asym", "int2-g8", "int3-g16-asym", "int4", "int4-g16", "int4-g12-asym-bf16"),
        *(
            "int4-g12-asym16",
            "int8-asym16",
            "int3-asym16",
            "int4-g64",
            "int5-g8",
            "int6-asym",
            "int7-fp32",
            "int8",
            "int8-asym",
            "int8-g16-fp32",
        ),
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


@pytest.mark.parametrize("format", ["int4", "fp8", "e5m2"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "token", "group"])
def test_activations_of_few_bits_are_exact(tmp_path: Path, granularity: str, format: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    program = capture(nn.Linear(16, 8), x)
    context = Context(calibration=Calibration(DataSource(examples=x)))
    passes = [QuantizeWeights("int4-g8"), QuantizeActivations(format, granularity=granularity)]
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
