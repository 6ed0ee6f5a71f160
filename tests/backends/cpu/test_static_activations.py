"""Activations of one stored scale go through the integer kernels."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from tests.backends.cpu.test_backend import assert_close, interpret, some_ids
from tests.backends.cpu.test_transforms import TOKENS, after_recipe
from torch import Tensor, nn

from qcompile.backends.cpu import ops
from qcompile.backends.cpu.lower.fuse_linear import FuseLinear
from qcompile.backends.cpu.lower.fuse_residual import FuseResidual
from qcompile.backends.cpu.lower.fuse_siblings import FuseSiblings
from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.compiler import compile
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Context, PassManager, run_passes
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.recipe import load_recipe

if TYPE_CHECKING:
    from tests.backends.cpu.conftest import Models

X = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)) + 0.5


def rounded(module: nn.Module, weights: str = "int8", **options: Any) -> Program:
    torch.manual_seed(0)
    program = canonicalize(capture_module(module, (X,)))
    passes = [QuantizeWeights(weights), QuantizeActivations(granularity="tensor", **options)]
    context = Context(calibration=Calibration(DataSource(examples=X)))
    return PassManager(passes).run(program, context)[0]


def body(program: Program) -> str:
    return textwrap.dedent(program.text().split("\n", 1)[1])


def error(before: Program, after: Program, dtype: torch.dtype) -> float:
    found, expected = (Interpreter(p, dtype=dtype).run(3 * X.to(dtype))[0] for p in (after, before))
    return float((found - expected).abs().max() / expected.abs().max())


TEXT = {
    "int8": "@bias, None, 4, 32, integer-8-g0-float16, int8_static, @weight.input_grid)",
    "int8-asym": (
        "@weight.linear.folded_bias, None, 4, 32, integer-8-g0-float16, uint8_static, "
        "@weight.input_grid)"
    ),
}


@pytest.mark.parametrize("format", TEXT)
def test_rounding_by_a_stored_scale_becomes_an_operand(format: str) -> None:
    after = run_passes(rounded(nn.Linear(32, 4), format=format), [FuseLinear()])
    (node,) = (line for line in body(after).splitlines() if "cpu_linear" in line)
    assert node.endswith(f"qc.cpu_linear(%input_1, @weight.codes.packed, {TEXT[format]}")
    assert "qc.quantize" not in body(after)


@pytest.mark.parametrize("format", [*TEXT, "int4", "int5-asym"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "weights", ["int8", "int4-g16-asym", "int4-g16-asym16", "ternary-g16", "mxfp4"]
)
def test_lowered_layer_computes_the_same(format: str, bias: bool, weights: str) -> None:
    # Inputs reach three times beyond the range: they land on the last codes.
    before = rounded(nn.Linear(32, 4, bias=bias), weights, format=format)
    after = run_passes(before, [FuseLinear()])
    assert error(before, after, torch.float64) < 1e-14
    # A bias of the size of the zero point's share is added and taken away again.
    assert error(before, after, torch.float32) < 2e-6


@pytest.mark.parametrize(
    ("weights", "options"),
    [("nf4-g16", {"format": "int8"}), ("int8", {"format": "fp8"})],
)
def test_what_the_kernels_do_not_multiply_stays_nodes(
    weights: str, options: Mapping[str, Any]
) -> None:
    after = run_passes(rounded(nn.Linear(32, 4), weights, **options), [FuseLinear()])
    (node,) = after.calls(ops.linear)
    assert node.args[7] == "float"
    assert node.args[0].target in (dialect.dequantize, dialect.lookup)  # type: ignore[union-attr]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, 16), nn.Linear(32, 16)
        self.down = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = dialect.rms_norm(x, None, 1e-5)
        return x + self.down(dialect.gated_act(self.gate(y), self.up(y), "silu"))


@pytest.mark.parametrize("format", TEXT)
def test_siblings_and_residuals_take_the_grid_along(format: str) -> None:
    before = rounded(Gated(), format=format)
    after = run_passes(before, [FuseLinear(), FuseResidual(), FuseSiblings()])
    lines = body(after).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("silu, True, 1e-05, @gate.input_grid)")
    assert lines[1].endswith("_static, @down.input_grid)")
    assert "%input_1, 32, 16" in lines[1].replace("%x", "%input_1")
    assert error(before, after, torch.float64) < 1e-14


@pytest.mark.parametrize("format", TEXT)
def test_compiled_model_multiplies_integers_only(
    program: Models, tmp_path: Path, format: str
) -> None:
    steps = [
        {"quantize_weights": {"format": "int8"}},
        {"quantize_activations": {"format": format, "granularity": "tensor"}},
    ]
    recipe = load_recipe({"name": "static", "steps": steps})
    artifact = compile(
        program("llama"),
        recipe=recipe,
        output=tmp_path / "out",
        threads=1,
        calibration=torch.from_numpy(TOKENS),
        work_dir=tmp_path / "work",
    )
    nodes = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph.node
    acts = {a.s.decode() for node in nodes for a in node.attribute if a.name == "act"}
    assert acts == {"int8_static" if format == "int8" else "uint8_static"}
    assert not {"QuantizeLinear", "Round"} & {node.op_type for node in nodes}
    ids = some_ids(2, 9)
    expected = interpret(after_recipe(program("llama"), recipe), ids)
    assert_close(artifact.forward(ids), expected, "w8a8-rtn")
    assert len(artifact.generate([5, 6, 7], max_new_tokens=4)) >= 1
