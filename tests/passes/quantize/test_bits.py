import json

import pytest

from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.quantize_activations import QuantizeActivations
from qcompile.passes.quantize.quantize_weights import QuantizeWeights

# Weights of the model in conftest.py: embed 24*20, positions 8*20, gate and up 32*20 (and a bias
# of 32), down 20*32, head 24*20 unless tied.
EMBED, POSITIONS, UP, BIAS = 480, 160, 640, 32


def by_name(report):
    return {tensor.name: tensor for tensor in report.tensors}


def test_float_program_counts_each_tensor_at_its_dtype(tied):
    report = count_bits(tied)
    assert by_name(report)["embed.weight"].bits == EMBED * 32
    assert report.bytes == (EMBED + POSITIONS + 3 * UP + BIAS) * 4
    assert report.overall == 32.0
    assert report.quantized == report.advertised == 0.0


def test_scales_zero_points_and_short_groups_are_counted(untied):
    after = run_passes(untied, [QuantizeWeights("int4-g16-asym", ignore=["embed", "head"])])
    gate = by_name(count_bits(after))["gate.weight"]
    assert gate.format == "int4-g16-asym"
    # 20 inputs make one whole group and one of 4: two scales and zero points for each of 32 rows.
    assert (gate.code_bits, gate.scale_bits, gate.zero_point_bits) == (640 * 4, 64 * 16, 64 * 4)


def test_totals_are_exact_over_quantized_and_float_weights(tied):
    passes = [QuantizeWeights("int4-g16", embedding="int8"), QuantizeActivations()]
    report = count_bits(run_passes(tied, passes))
    linear_bits = 3 * UP * 4 + (32 * 2 + 32 * 2 + 20 * 2) * 16
    table_bits = EMBED * 8 + 24 * 16
    float_bits = (POSITIONS + BIAS) * 32
    quantized = 3 * UP + EMBED
    assert report.advertised == pytest.approx((3 * UP * 4 + EMBED * 8) / quantized, rel=1e-12)
    assert report.quantized == pytest.approx((linear_bits + table_bits) / quantized, rel=1e-12)
    total = linear_bits + table_bits + float_bits
    assert report.overall == pytest.approx(total / (quantized + POSITIONS + BIAS), rel=1e-12)
    assert report.bytes == total // 8


def test_tied_table_counts_once(tied, untied):
    table = QuantizeWeights("int8", embedding="int8")
    once, twice = (count_bits(run_passes(p, [table])) for p in (tied, untied))
    assert twice.bytes - once.bytes == EMBED + 24 * 2


def test_odd_bits_are_rounded_up_to_whole_bytes(linear):
    report = count_bits(run_passes(linear, [QuantizeWeights("int3-g16-asym")]))
    bits = 128 * 3 + 8 * 16 + 8 * 3 + 4 * 32
    assert report.bytes == -(-bits // 8)


def test_report_becomes_json(tied):
    report = count_bits(run_passes(tied, [QuantizeWeights("int4-g16")]))
    content = json.loads(json.dumps(report.to_dict()))
    assert content["stored_bits_per_weight"] == report.overall
    assert content["weights"] == EMBED + POSITIONS + 3 * UP + BIAS
    assert {tensor["name"] for tensor in content["tensors"]} == set(by_name(report))
    assert content["tensors"][0]["bits_per_weight"] == report.tensors[0].bits_per_weight
