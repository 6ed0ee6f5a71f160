import textwrap

import pytest
import torch

from qcompile.calibration.settings import Calibration
from qcompile.calibration.sources import DataSource
from qcompile.errors import QCompileError, RecipeError
from qcompile.ir import dialect
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.reference import dynamic_scale, quantize
from qcompile.passes.infra import Context, PassManager, run_passes
from qcompile.passes.quantize.layers import EMBEDDING
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


def run(program, weights, **options):
    passes = [QuantizeWeights(weights), QuantizeActivations(**options)]
    after, records = PassManager(passes).run(program)
    return after, records[1].result


def run_static(program, x, **options):
    context = Context(calibration=Calibration(DataSource(examples=x)))
    passes = [QuantizeWeights("int8"), QuantizeActivations(**options)]
    after, records = PassManager(passes).run(program, context)
    return after, records[1].result


def groups(result):
    return [(detail["group_size"], detail["weights"]) for detail in result.details]


def test_input_is_scaled_rounded_and_decoded_before_the_linear(linear):
    after, _ = run(linear, "int4-g16", granularity="group")
    assert after.text() == textwrap.dedent("""\
        program(%input_1: f32[s0, 32]) {canonical, weights_quantized}
          %0: f32[4, 32] = qc.dequantize(@weight.codes, @weight.scale, None, 4, 16)
          %1: f32[s0, 2] = qc.dynamic_scale(%input_1, 8, 16)
          %2: i8[s0, 32] = qc.quantize(%input_1, %1, None, 8, 16)
          %3: f32[s0, 32] = qc.dequantize(%2, %1, None, 8, 16)
          %4: f32[s0, 4] = aten.linear(%3, %0, @bias)
          return %4
        """)


def test_scale_is_per_token_by_default(linear):
    after, result = run(linear, "int4-g16")
    assert "%1: f32[s0, 1] = qc.dynamic_scale(%input_1, 8, 0)" in after.text()
    assert groups(result) == [(0, ["weight"])]


def test_program_computes_with_the_rounded_input(linear):
    after, _ = run(linear, "int4-g16", granularity="group")
    weights_only = run_passes(linear, [QuantizeWeights("int4-g16")])
    x = torch.randn(3, 32)
    scale = dynamic_scale(x, 8, 16)
    rounded = dequantize(quantize(x, scale, None, 8, 16), scale, None, 8, 16)
    assert torch.equal(after(x), weights_only(rounded))


def test_linears_with_one_input_share_its_codes(untied):
    after, result = run(untied, "int4-g16", granularity="group")
    assert groups(result) == [
        (16, ["gate.weight", "up.weight"]),
        (16, ["down.weight"]),
        (16, ["head.weight"]),
    ]
    assert len(list(after.calls(dialect.dynamic_scale))) == 3
    assert result.rewrites == 4


def test_linears_with_one_input_and_other_groups_do_not_share(untied):
    passes = [
        QuantizeWeights("int4-g16", overrides=[{"match": "up", "format": "int4-g10"}]),
        QuantizeActivations(granularity="group"),
    ]
    after, records = PassManager(passes).run(untied)
    assert groups(records[1].result)[:2] == [(16, ["gate.weight"]), (10, ["up.weight"])]
    per_token = run_passes(untied, [passes[0], QuantizeActivations()])
    assert len(list(after.calls(dialect.quantize))) == 4
    assert len(list(per_token.calls(dialect.quantize))) == 3


def test_embedding_lookup_is_left_alone(tied):
    after, result = run(tied, "int8")
    assert groups(result)[-1] == (0, ["embed.weight"])
    (lookup,) = (
        node for node in after.calls(EMBEDDING) if node.args[0].target == dialect.dequantize
    )
    assert lookup.args[1].op == "placeholder"


def test_inputs_of_float_linears_stay_float(untied):
    passes = [QuantizeWeights("int8", ignore=["gate", "up"]), QuantizeActivations(ignore=["head"])]
    _, records = PassManager(passes).run(untied)
    result = records[1].result
    assert groups(result) == [(0, ["down.weight"])]
    assert [(s.node, s.reason) for s in result.skips] == [
        ("head.weight", "its input is kept float by the recipe")
    ]


def test_running_twice_changes_nothing_more(untied):
    once, _ = run(untied, "int8")
    twice, records = PassManager([QuantizeActivations()]).run(once)
    assert records[0].result.rewrites == 0
    assert twice.text() == once.text()


def test_eight_bit_codes_keep_the_output_close(untied, ids):
    # int8 weights and inputs: half a step in 127 on either side, over 20 to 32 products.
    after, _ = run(untied, "int8")
    error = (after(ids) - untied(ids)).norm() / untied(ids).norm()
    assert 0 < error < 0.02


def test_floats_of_8_bits_have_nodes_of_their_own(linear):
    after, result = run(linear, "int4-g16", format="fp8", granularity="group")
    assert after.text() == textwrap.dedent("""\
        program(%input_1: f32[s0, 32]) {canonical, weights_quantized}
          %0: f32[4, 32] = qc.dequantize(@weight.codes, @weight.scale, None, 4, 16)
          %1: f32[s0, 2] = qc.float_scale(%input_1, e4m3, 16)
          %2: u8[s0, 32] = qc.quantize_float(%input_1, %1, e4m3, 16)
          %3: f32[s0, 32] = qc.lookup(%2, %1, e4m3, 16)
          %4: f32[s0, 4] = aten.linear(%3, %0, @bias)
          return %4
        """)
    assert result.details[0]["format"] == "e4m3"


@pytest.mark.parametrize("format", ["fp4", "e3m0", "e1m2"])
def test_smaller_floats_have_the_same_nodes(linear, format):
    after, result = run(linear, "fp4-g16", format=format)
    table = str(result.details[0]["format"])
    assert [line.strip() for line in after.text().splitlines()[2:5]] == [
        f"%1: f32[s0, 1] = qc.float_scale(%input_1, {table}, 0)",
        f"%2: u8[s0, 32] = qc.quantize_float(%input_1, %1, {table}, 0)",
        f"%3: f32[s0, 32] = qc.lookup(%2, %1, {table}, 0)",
    ]


# The largest of all values is further beyond the others than the largest of each token.
@pytest.mark.parametrize(
    ("granularity", "spread", "table"),
    [
        *(("token", 0, "e1m2"), ("token", 5, "e2m1"), ("group", 0, "e1m2"), ("group", 5, "e2m1")),
        *(("tensor", 0, "e1m2"), ("tensor", 1, "e2m1"), ("tensor", 5, "e3m0")),
    ],
)
def test_searched_floats_follow_the_distribution(linear, granularity, spread, table):
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    x = x**spread if spread else torch.sin(x * 9)
    context = Context(calibration=Calibration(DataSource(examples=x)))
    rounding = QuantizeActivations("fp4-searched", granularity=granularity)
    passes = [QuantizeWeights("int4-g16"), rounding]
    _, records = PassManager(passes).run(linear, context)
    (detail,) = records[1].result.details
    assert (detail["format"], detail["choice"]) == (table, "fp4-searched")


def test_floats_of_8_bits_round_to_three_bits_of_mantissa(linear):
    after, _ = run(linear, "int4-g16", format="fp8")
    weights_only = run_passes(linear, [QuantizeWeights("int4-g16")])
    x = torch.randn(3, 32)
    scale = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(after(x), weights_only(rounded))


STATIC_TEXT = {
    "int8": """
          %1: i8[s0, 32] = qc.quantize(%input_1, @input_scale, None, 8, 0)
          %2: f32[s0, 32] = qc.dequantize(%1, @input_scale, None, 8, 0)""",
    "int8-asym": """
          %1: u8[s0, 32] = qc.quantize(%input_1, @input_scale, @input_zero_point, 8, 0)
          %2: f32[s0, 32] = qc.dequantize(%1, @input_scale, @input_zero_point, 8, 0)""",
    "fp8": """
          %1: u8[s0, 32] = qc.quantize_float(%input_1, @input_scale, e4m3, 0)
          %2: f32[s0, 32] = qc.lookup(%1, @input_scale, e4m3, 0)""",
    "fp4": """
          %1: u8[s0, 32] = qc.quantize_float(%input_1, @input_scale, e2m1, 0)
          %2: f32[s0, 32] = qc.lookup(%1, @input_scale, e2m1, 0)""",
}


@pytest.mark.parametrize("format", STATIC_TEXT)
def test_static_scales_are_weights(linear, format):
    x = torch.randn(40, 32) + 1
    after, result = run_static(linear, x, format=format, granularity="tensor")
    lines = [line.strip() for line in after.text().splitlines()[2:4]]
    assert lines == [
        line.strip().replace("@", "@weight.") for line in STATIC_TEXT[format].split("\n")[1:]
    ]
    scale = after.weights.materialize("weight.input_scale")
    largest = {"int8": 127, "fp8": 448, "fp4": 6}.get(format)
    if largest is None:
        torch.testing.assert_close(scale, (x.max() - x.min()).reshape(1) / 255)
        zero = after.weights.materialize("weight.input_zero_point")
        assert zero.tolist() == [round(float(-x.min() / scale))]
    else:
        torch.testing.assert_close(scale, x.abs().max().reshape(1) / largest)
    assert result.details[0]["scale"] == float(scale)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_zero_points_halve_the_steps_of_one_sided_inputs(linear, granularity):
    x = torch.rand(60, 32)
    exact = run_passes(linear, [QuantizeWeights("int8")])(x)
    errors = {
        format: float(
            (run_static(linear, x, format=format, granularity=granularity)[0](x) - exact).norm()
        )
        for format in ("int4", "int4-asym")
    }
    # 15 steps over the range instead of 7; the error is a step's share.
    assert 0.35 < errors["int4-asym"] / errors["int4"] < 0.6


@pytest.mark.parametrize("format", ["int4", "int4-asym", "fp4", "e1m2"])
def test_clipping_by_least_error_loses_least(linear, format):
    # Heavy tails: the largest of 12,800 values is far beyond nearly all of them.
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)) ** 3
    exact = run_passes(linear, [QuantizeWeights("int8")])(x)
    options = {"format": format, "granularity": "tensor"}
    errors = {
        ranges: float((run_static(linear, x, ranges=ranges, **options)[0](x) - exact).norm())
        for ranges in ("absmax", "percentile", "mse")
    }
    assert errors["mse"] < 0.8 * errors["absmax"]
    assert errors["mse"] < errors["percentile"]


def test_weights_must_be_quantized_before(untied):
    with pytest.raises(QCompileError, match="needs a program that is weights_quantized"):
        run_passes(untied, [QuantizeActivations()])


def test_unknown_options_are_refused():
    with pytest.raises(RecipeError, match="cannot be 'int9'"):
        QuantizeActivations("int9")
    with pytest.raises(RecipeError, match="unknown choice 'row'"):
        QuantizeActivations(granularity="row")
    with pytest.raises(RecipeError, match="measured at run time and have no zero points"):
        QuantizeActivations("int8-asym")
    with pytest.raises(RecipeError, match="measured at run time and have no zero points"):
        QuantizeActivations(overrides=[{"match": "up", "format": "int4-asym"}])
    with pytest.raises(RecipeError, match="no format is searched where scales are per channel"):
        QuantizeActivations("fp4-searched", granularity="channel")
    with pytest.raises(RecipeError, match="per channel span 'absmax'"):
        QuantizeActivations(granularity="channel", ranges="mse")
