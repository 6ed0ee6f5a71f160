"""What routed experts read is rounded: their input, and what stands between their matrices."""

from typing import Any

import pytest
import torch
from tests.passes.quantize.moe import experts

from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.kernels.experts.reference import expert_hidden, expert_output
from qcompile.passes.infra import Context, PassManager, PassResult, run_passes
from qcompile.passes.quantize.activation_formats import parse_activation_format
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

ALONE = ["router*", "shared*"]


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(9, 32, generator=torch.Generator().manual_seed(1))


def quantized(weights: str = "int4-g8") -> Program:
    return run_passes(experts(), [QuantizeWeights(weights, ignore=ALONE)])


def rounded(
    program: Program, x: torch.Tensor | None = None, **options: Any
) -> tuple[Program, PassResult]:
    context = Context(calibration=Calibration(DataSource(examples=x)))
    after, (record,) = PassManager([QuantizeActivations(**options)]).run(program, context)
    return after, record.result


def parts_of(program: Program, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the layer computes with: choices, shares, decoded matrices, and what is not routed."""
    weights = program.weights
    logits = x @ weights.materialize("router.weight").T + weights.materialize("router.bias")
    weight, index = logits.softmax(-1).topk(2)
    up, down = (
        torch.ops.qc.dequantize(
            weights.materialize(f"{name}.codes"), weights.materialize(f"{name}.scale"), None, 4, 8
        )
        for name in ("up", "down")
    )
    rest = x + x @ weights.materialize("shared.weight").T
    return {"weight": weight, "index": index, "up": up, "down": down, "rest": rest}


def test_both_inputs_are_nodes_of_the_program() -> None:
    after, result = rounded(quantized(), granularity="group")
    assert [line.strip() for line in after.text().splitlines()[8:16]] == [
        "%7: f32[s0, 4] = qc.dynamic_scale(%x, 8, 8)",
        "%8: i8[s0, 32] = qc.quantize(%x, %7, None, 8, 8)",
        "%9: f32[s0, 32] = qc.dequantize(%8, %7, None, 8, 8)",
        "%10: f32[s0, 2, 24] = qc.expert_hidden(%9, %6, %0, None, silu, True, 0, 0)",
        "%11: f32[s0, 2, 3] = qc.dynamic_scale(%10, 8, 8)",
        "%12: i8[s0, 2, 24] = qc.quantize(%10, %11, None, 8, 8)",
        "%13: f32[s0, 2, 24] = qc.dequantize(%12, %11, None, 8, 8)",
        "%14: f32[s0, 32] = qc.expert_output(%13, %6, %5, %1, None)",
    ]
    assert [(d["weights"], d["group_size"]) for d in result.details] == [(["up"], 8), (["down"], 8)]


@pytest.mark.parametrize(
    ("format", "granularity"), [("int8", "token"), ("int4", "group"), ("fp4", "token")]
)
def test_program_computes_with_rounded_inputs(
    x: torch.Tensor, format: str, granularity: str
) -> None:
    before = quantized()
    after, _ = rounded(before, format=format, granularity=granularity)
    (kind,) = parse_activation_format(format).candidates
    size = 8 if granularity == "group" else 0

    def through(values: torch.Tensor) -> torch.Tensor:
        return kind.round(values, kind.covering(values, size), size)

    parts = parts_of(before, x)
    gate = (None, "silu", True, 0.0, 0.0)
    hidden = expert_hidden(through(x), parts["index"], parts["up"], *gate)
    routed = expert_output(through(hidden), parts["index"], parts["weight"], parts["down"], None)
    torch.testing.assert_close(after(x), parts["rest"] + routed, rtol=1e-5, atol=1e-5)


def test_static_scales_cover_what_stands_between_the_matrices(x: torch.Tensor) -> None:
    before = quantized()
    after, result = rounded(before, x, granularity="tensor")
    parts = parts_of(before, x)
    hidden = expert_hidden(x, parts["index"], parts["up"], None, "silu", True, 0.0, 0.0)
    assert [detail["weights"] for detail in result.details] == [["up"], ["down"]]
    scales = [after.weights.materialize(f"{name}.input_scale") for name in ("up", "down")]
    for scale, seen in zip(scales, (x, hidden), strict=True):
        torch.testing.assert_close(scale, seen.abs().max().reshape(1) / 127)


def test_experts_share_codes_with_the_linears_beside_them() -> None:
    program = run_passes(experts(), [QuantizeWeights("int8")])
    _, result = rounded(program)
    assert [detail["weights"] for detail in result.details] == [
        ["router.weight", "up", "shared.weight"],
        ["down"],
    ]


def test_experts_whose_inputs_stay_float_stay_one_node() -> None:
    after, result = rounded(quantized(), ignore=["up", "down"])
    assert len(list(after.calls(dialect.experts))) == 1
    assert not result.details


def test_one_of_the_inputs_can_stay_float() -> None:
    after, result = rounded(quantized(), ignore=["down"])
    assert [detail["weights"] for detail in result.details] == [["up"]]
    assert [(skip.node, skip.reason) for skip in result.skips] == [
        ("down", "its input is kept float by the recipe")
    ]
    assert not list(after.calls(dialect.experts))
