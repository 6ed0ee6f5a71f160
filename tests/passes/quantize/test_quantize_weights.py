import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qcompile.errors import ModelError, QCompileError, RecipeError
from qcompile.formats import parse_format, rtn
from qcompile.ir import dialect
from qcompile.ir.types import Fact
from qcompile.passes.infra import Context, PassManager, run_passes
from qcompile.passes.quantize.layers import LINEAR
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.progress import NullProgress


def run(program, *args, **kwargs):
    """The program after the pass, and the pass's result."""
    after, records = PassManager([QuantizeWeights(*args, **kwargs)]).run(program)
    return after, records[0].result


def formats(result):
    return {detail["weight"]: detail["format"] for detail in result.details}


def reasons(result):
    return {skip.node: skip.reason for skip in result.skips}


def test_linear_weight_becomes_codes_and_scales(linear):
    assert linear.text() == textwrap.dedent("""\
        program(%input_1: f32[s0, 32]) {canonical}
          %0: f32[s0, 4] = aten.linear(%input_1, @weight, @bias)
          return %0
        """)
    after, _ = run(linear, "int4-g16")
    assert after.text() == textwrap.dedent("""\
        program(%input_1: f32[s0, 32]) {canonical, weights_quantized}
          %0: f32[4, 32] = qc.dequantize(@weight.codes, @weight.scale, None, 4, 16)
          %1: f32[s0, 4] = aten.linear(%input_1, %0, @bias)
          return %1
        """)
    assert "weight" not in after.weights


def test_asymmetric_weight_has_zero_points(linear):
    after, _ = run(linear, "int4-g16-asym-bf16")
    assert "qc.dequantize(@weight.codes, @weight.scale, @weight.zero_point, 4, 16)" in after.text()
    assert after.weights.spec("weight.scale").dtype == torch.bfloat16
    assert after.weights.spec("weight.zero_point").shape == (4, 2)


def test_program_computes_with_the_decoded_weight(linear):
    after, _ = run(linear, "int4-g16-asym")
    x = torch.randn(3, 32)
    format = parse_format("int4-g16-asym")
    weight = linear.weights.materialize("weight")
    decoded = format.decode(format.encode(weight))
    expected = nn.functional.linear(x, decoded, linear.weights.materialize("bias"))
    assert torch.equal(after(x), expected)


def test_each_part_of_a_language_model_gets_its_format(untied):
    _, result = run(
        untied, "int4-g16", embedding="int8", lm_head="int6-g16", ignore=["up"], overrides=()
    )
    assert formats(result) == {
        "embed.weight": "int8",
        "gate.weight": "int4-g16",
        "down.weight": "int4-g16",
        "head.weight": "int6-g16",
    }
    assert reasons(result) == {
        "positions.weight": "embeddings of positions and types stay float",
        "up.weight": "ignored by pattern 'up'",
    }


def test_embedding_and_head_have_defaults(untied):
    _, result = run(untied, "int4-g16")
    assert formats(result)["head.weight"] == "int4-g16"
    assert reasons(result)["embed.weight"] == "the recipe keeps the embedding float"


def test_last_matching_override_wins_over_parts_but_not_over_ignore(untied):
    _, result = run(
        untied,
        "int4-g16",
        lm_head="int8",
        ignore=["down.*"],
        overrides=[
            {"match": "*", "format": "int3-g16"},
            {"match": "head", "format": "int5-g16"},
            {"match": "gate.weight", "format": "float"},
            {"match": "down.weight", "format": "int2-g16"},
        ],
    )
    assert formats(result) == {
        "embed.weight": "int3-g16",
        "positions.weight": "int3-g16",
        "up.weight": "int3-g16",
        "head.weight": "int5-g16",
    }
    assert reasons(result) == {
        "gate.weight": "float by pattern 'gate.weight'",
        "down.weight": "ignored by pattern 'down.*'",
    }


def test_override_may_be_an_object(untied):
    override = SimpleNamespace(match="gate", format="int8")
    _, result = run(untied, "int4-g16", overrides=(override,))
    assert formats(result)["gate.weight"] == "int8"
    assert formats(result)["up.weight"] == "int4-g16"


def test_pattern_that_matches_nothing_is_reported(untied):
    _, result = run(untied, "int4-g16", ignore=["model.layers.*"])
    assert reasons(result)["model.layers.*"] == "the pattern matches no weight"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "int4-g16"),
        ({"lm_head": "int8"}, "int8"),
        ({"embedding": "int8"}, "int8"),
        ({"embedding": "int8-g16", "lm_head": "int8-g16"}, "int8-g16"),
    ],
)
def test_tied_weight_is_quantized_once_and_stays_one_tensor(tied, ids, options, expected):
    after, result = run(tied, "int4-g16", **options)
    assert formats(result)["embed.weight"] == expected
    tables = [
        n for n in after.calls(dialect.dequantize) if n.args[0].target == "embed.weight.codes"
    ]
    assert len(tables) == 1
    users = {str(user.target) for user in tables[0].users}
    assert users == {"aten.embedding.default", "aten.linear.default"}
    assert sum(name.startswith(("embed", "head")) for name in after.weights) == 2
    assert not torch.equal(after(ids), tied(ids))


def test_tied_weight_stays_float_when_asked(tied):
    after, result = run(tied, "int4-g16", embedding="float")
    assert "embed.weight" in after.weights
    assert reasons(result)["embed.weight"] == "the recipe keeps embedding and lm_head float"


@pytest.mark.parametrize("head", ["int4-g16", "float"])
def test_tied_weight_with_two_formats_is_refused_before_any_work(tied, head):
    progress = Counter()
    with pytest.raises(RecipeError, match=r"'embed\.weight' is both embedding and lm_head"):
        QuantizeWeights("int4-g16", embedding="int8", lm_head=head).run(
            tied.copy(), Context(progress)
        )
    assert progress.steps == []


class Counter(NullProgress):
    def __init__(self):
        self.total = None
        self.steps = []

    def stage(self, name, total=None):
        self.total = total

    def advance(self, steps=1, detail=""):
        self.steps.append(detail)


def test_progress_counts_weights(untied):
    progress = Counter()
    PassManager([QuantizeWeights("int8")]).run(untied, Context(progress))
    assert progress.total == 4
    assert progress.steps == ["gate.weight", "up.weight", "down.weight", "head.weight"]


def test_record_tells_format_bits_and_error(linear):
    _, result = run(linear, "int3-g16", scale_search="mse")
    weight = linear.weights.materialize("weight")
    expected = rtn(weight, parse_format("int3-g16"), scale_search="mse").relative_error
    assert result.details == [
        {
            "weight": "weight",
            "parts": ["linear"],
            "method": "rtn",
            "format": "int3-g16",
            "shape": [4, 32],
            "bits_per_weight": 4.0,
            "relative_error": expected,
        }
    ]
    assert result.rewrites == 1


def test_weight_with_another_use_stays_float_with_its_reason(linear):
    class Regularized(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.weight.sum()

    from dataclasses import replace

    from qcompile.frontends.torch_export import capture_module

    program = capture_module(Regularized(32, 4), torch.zeros(3, 32))
    program = replace(program, facts=linear.facts)
    after, result = run(program, "int4-g16")
    assert reasons(result) == {"weight": "used by aten.sum"}
    assert not list(after.calls(dialect.dequantize))
    assert len(list(after.calls(LINEAR))) == 1


def test_original_program_is_untouched(untied, ids):
    before, logits = untied.text(), untied(ids)
    run(untied, "int2-g16", embedding="int2-g16")
    assert untied.text() == before
    assert torch.equal(untied(ids), logits)


def test_weight_that_is_not_finite_is_named(untied):
    weight = untied.weights.materialize("down.weight").clone()
    weight[3, 3] = torch.nan
    untied.weights.put("down.weight", weight)
    with pytest.raises(ModelError, match=r"'down\.weight' contains NaN"):
        run(untied, "int8")


def test_program_must_be_canonical(untied):
    untied.facts = frozenset()
    with pytest.raises(QCompileError, match="needs a program that is canonical"):
        run_passes(untied, [QuantizeWeights("int8")])


def test_weights_are_quantized_once(untied):
    once, _ = run(untied, "int8")
    again, result = run(once, "int4-g16")
    assert result.rewrites == 0
    assert again.text() == once.text()
    assert Fact.WEIGHTS_QUANTIZED in again.facts


def test_unknown_method_and_format_are_refused():
    with pytest.raises(RecipeError, match="unknown method 'gtpq'"):
        QuantizeWeights("int8", method="gtpq")
    with pytest.raises(RecipeError, match="unknown format 'in8'"):
        QuantizeWeights("int8", lm_head="in8")
