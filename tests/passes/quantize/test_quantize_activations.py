import textwrap

import pytest
import torch

from qcompile.errors import QCompileError, RecipeError
from qcompile.ir import dialect
from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.reference import dynamic_scale, quantize
from qcompile.passes.infra import PassManager, run_passes
from qcompile.passes.quantize.layers import EMBEDDING
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


def run(program, weights, **options):
    passes = [QuantizeWeights(weights), QuantizeActivations(**options)]
    after, records = PassManager(passes).run(program)
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


def test_weights_must_be_quantized_before(untied):
    with pytest.raises(QCompileError, match="needs a program that is weights_quantized"):
        run_passes(untied, [QuantizeActivations()])


def test_unknown_options_are_refused():
    with pytest.raises(RecipeError, match="cannot be 'int9'"):
        QuantizeActivations("int9")
    with pytest.raises(RecipeError, match="unknown choice 'row'"):
        QuantizeActivations(granularity="row")
    with pytest.raises(RecipeError, match="per channel span 'absmax'"):
        QuantizeActivations(granularity="channel", ranges="mse")
