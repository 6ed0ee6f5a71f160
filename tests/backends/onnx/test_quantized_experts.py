"""Quantized experts in standard operators: exact, and stored at the width of their codes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from tests.backends.onnx.written import EXACT, operators, relative, run, write
from tests.passes.quantize.moe import experts

from qcompile.backends.onnx.target import OnnxTarget
from qcompile.ir.program import Program
from qcompile.passes.infra import Context, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

FORMATS = [
    "int4",
    "int4-g8-asym",
    "int4-g8-asym16",
    "int4-g16",
    "int8",
    "int3-g16-asym",
    "nf4-g8",
    "nf4-g16-dq",
]
FORMATS += ["fp8", "mxfp4", "nvfp4", "ternary-g8", "fp4-g16", "int4-g8-asym-intscale"]


def quantized(format: str, **options: object) -> Program:
    """A layer whose experts alone are quantized; their second matrices have 24 columns."""
    step = QuantizeWeights(format, ignore=["router*", "shared*"])
    return run_passes(experts(**options), [step])


@pytest.mark.parametrize("format", FORMATS)
def test_quantized_experts_equal_the_program(format: str, tmp_path: Path) -> None:
    program = quantized(format, bias=format == "int4")
    write(program, tmp_path)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    assert relative(run(tmp_path, x)[0], program(x)) < EXACT


@pytest.mark.parametrize("opset", [21, 23])
def test_whole_groups_are_two_products_of_decoded_codes(opset: int, tmp_path: Path) -> None:
    model = write(quantized("int4-g8"), tmp_path, opset=opset)
    found = operators(model)
    assert found.count("DequantizeLinear") == 2
    # Router, shared linear, two for the experts.
    assert found.count("MatMul") == 4


def test_codes_of_experts_take_their_four_bits(tmp_path: Path) -> None:
    program = quantized("int4-g8")
    model = write(program, tmp_path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert list(stored["up.codes.matrix"].dims) == [32, 4 * 48]
    assert list(stored["down.codes.matrix"].dims) == [4 * 24, 32]
    for name in ("up", "down"):
        assert stored[f"{name}.codes.matrix"].data_type == onnx.TensorProto.INT4
    target = OnnxTarget()
    sizes = target.predict_files(target.lower(program, Context()))
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.iterdir()}


@pytest.mark.parametrize("weights", ["int4-g8", "int4", "nf4-g8"])
@pytest.mark.parametrize("format", ["int8", "fp8", "fp4"])
def test_experts_of_rounded_inputs_equal_the_program(
    weights: str, format: str, tmp_path: Path
) -> None:
    program = run_passes(quantized(weights, bias=weights == "int4"), [QuantizeActivations(format)])
    write(program, tmp_path)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    assert relative(run(tmp_path, x)[0], program(x)) < EXACT
