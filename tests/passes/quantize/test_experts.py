"""Weights of routed experts: stored per expert, row and group, chosen expert by expert."""

from dataclasses import replace

import pytest
import torch
from tests.passes.quantize.moe import experts

from qcompile.calibration.journal import Journal
from qcompile.calibration.samples import ExampleInputs
from qcompile.calibration.settings import Calibration
from qcompile.calibration.statistics import Hessian
from qcompile.calibration.stream import Stream
from qcompile.errors import ModelError
from qcompile.formats import QuantizedWeight, parse_format, stored_weight
from qcompile.ir import dialect
from qcompile.passes.infra import Context, PassManager, run_passes
from qcompile.passes.quantize.bits import count_bits
from qcompile.passes.quantize.layers import Part, layer_weights
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.llm_fp4 import LlmFp4
from qcompile.passes.quantize.quantize_weights import QuantizeWeights


def decoded(program, name):
    """What stands for a weight, as float32."""
    call = next(program.calls(dialect.experts))
    stored = next(w for w in map(stored_weight, call.args) if w is not None and w.name == name)
    tensors = {
        part: program.weights.materialize(str(n.target)) for part, n in stored.tensors.items()
    }
    return stored.format.decode(QuantizedWeight(stored.format, stored.shape, tensors))


def test_experts_are_found_and_their_biases_stay_float():
    weights, excluded = layer_weights(experts(bias=True))
    parts = {weight.name: weight.parts for weight in weights}
    assert parts["up"] == parts["down"] == {Part.EXPERTS}
    assert excluded == dict.fromkeys(("up_bias", "down_bias"), "biases of experts stay float")


@pytest.mark.parametrize(
    "format", ["int4-g16", "int3-g16-asym", "int8", "nf4-g16-dq", "nvfp4", "mxfp4", "ternary"]
)
def test_rounding_treats_each_expert_as_a_matrix_of_its_own(format):
    program = experts()
    after = run_passes(program, [QuantizeWeights(format)])
    after.verify(shapes=True)
    kind = parse_format(format)
    for name in ("up", "down"):
        weight = program.weights.materialize(name)
        expected = torch.stack([kind.decode(kind.encode(matrix)) for matrix in weight])
        assert torch.equal(decoded(after, name), expected)


@pytest.mark.parametrize("format", ["int4-g16", "int3-g20-asym", "nf4-g16-dq", "nvfp4"])
def test_quantized_program_computes_with_the_decoded_weights(format):
    program = experts(bias=True)
    after = run_passes(program, [QuantizeWeights(format, ignore=["router*", "shared*"])])
    reference = program.copy()
    for name in ("up", "down"):
        reference.weights.put(name, decoded(after, name))
    x = torch.randn(7, 32)
    torch.testing.assert_close(after(x), reference(x), rtol=0, atol=0)


def test_bits_of_experts_are_counted_per_row_and_group():
    after = run_passes(experts(), [QuantizeWeights("int4-g16")])
    up = next(t for t in count_bits(after).tensors if t.name == "up")
    assert (up.code_bits, up.scale_bits) == (4 * 48 * 32 * 4, 4 * 48 * 2 * 16)


def test_record_names_the_experts_that_a_note_is_about():
    program = experts()
    _, records = PassManager([QuantizeWeights("int4-g16", method="hqq")]).run(program)
    record = next(d for d in records[0].result.details if d["weight"] == "up")
    assert record["parts"] == ["experts"]
    assert record["shape"] == [4, 48, 32]
    assert 0 < record["relative_error"] < 0.1


def test_weight_that_is_not_finite_names_the_expert():
    program = experts()
    broken = program.weights.materialize("up").clone()
    broken[2, 1, 1] = float("nan")
    program.weights.put("up", broken)
    with pytest.raises(ModelError, match=r"weight 'up\[2\]' contains NaN"):
        run_passes(program, [QuantizeWeights("int4-g16")])


FORMAT = parse_format("int3-g16-asym")
FEW = "few tokens were routed here, so what all experts read counts as well"


def calibrate(program, samples, method="gptq", journal=None, **options):
    """The program after a calibrated method, and the record of each weight."""
    step = QuantizeWeights(FORMAT, method=method, ignore=["router*", "shared*"], **options)
    context = Context(calibration=Calibration(ExampleInputs(samples), journal=journal))
    after, records = PassManager([step]).run(program, context)
    return after, {detail["weight"]: detail for detail in records[0].result.details}


def gptq(weight, parts, extra=None):
    """A matrix after GPTQ on rows, micro-batch by micro-batch, and perhaps on second moments."""
    hessian = Hessian()
    for rows in parts:
        hessian.update(rows)
    if extra is not None:
        hessian.merge(extra)
    outcome = Gptq().quantize(Task("w", weight, FORMAT, "absmax", Inputs(hessian)))
    return FORMAT.decode(outcome.weight)


def routed_rows(program, samples, expert):
    """What an expert reads of each micro-batch."""
    router = program.weights.materialize("router.weight")
    bias = program.weights.materialize("router.bias")
    for x in samples:
        index = (x @ router.T + bias).softmax(-1).topk(2).indices
        yield x[(index == expert).any(-1)]


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_each_expert_is_calibrated_on_the_rows_that_are_routed_to_it(sequential):
    program = experts()
    samples = list(torch.randn(3, 128, 32))
    after, records = calibrate(program, samples, sequential=sequential)
    up, down = (program.weights.materialize(name) for name in ("up", "down"))
    for expert in range(4):
        rows = list(routed_rows(program, samples, expert))
        quantized = gptq(up[expert], rows)
        assert torch.equal(decoded(after, "up")[expert], quantized)
        seen = quantized if sequential == "layer" else up[expert]
        gates = [(x @ seen.T).chunk(2, -1) for x in rows]
        hidden = [torch.nn.functional.silu(gate) * other for gate, other in gates]
        assert torch.equal(decoded(after, "down")[expert], gptq(down[expert], hidden))
    assert "notes" not in records["up"]
    assert 0 < records["up"]["output_error"] < records["up"]["relative_error"]


def test_expert_that_sees_few_rows_is_calibrated_on_what_all_of_them_see():
    program = experts(favourite=1)
    samples = list(torch.randn(2, 24, 32))
    after, records = calibrate(program, samples)
    weight = program.weights.materialize("up")
    seen = [list(routed_rows(program, samples, expert)) for expert in range(4)]
    everyone = Hessian()
    for rows in seen:
        for part in rows:
            everyone.update(part)
    few = [expert for expert in range(4) if sum(map(len, seen[expert])) < 32]
    assert few == [0, 2, 3]
    for expert in range(4):
        missing = max(0, 32 - sum(map(len, seen[expert])))
        extra = Hessian(everyone.matrix * missing, missing, everyone.peak) if missing else None
        assert torch.equal(decoded(after, "up")[expert], gptq(weight[expert], seen[expert], extra))
    assert records["up"]["notes"] == [f"experts 0, 2, 3: {FEW}"]


def test_expert_that_sees_nothing_is_calibrated_on_what_the_others_see():
    program = experts(count=6, favourite=1)
    bias = program.weights.materialize("router.bias").clone()
    bias[5] = -100
    program.weights.put("router.bias", bias)
    after, _ = calibrate(program, list(torch.randn(2, 64, 32)))
    weight = program.weights.materialize("up")[5]
    error = (decoded(after, "up")[5] - weight).norm() / weight.norm()
    assert 0 < error < 0.3


@pytest.mark.parametrize("method", ["gptq", "magr"])
def test_calibrated_experts_leave_less_error_than_rounded_ones(method):
    program = experts()
    samples = list(torch.randn(4, 128, 8) @ torch.randn(8, 32))  # inputs that depend on each other
    rounded, _ = calibrate(program, samples, method="rtn")
    calibrated, _ = calibrate(program, samples, method=method)
    x = torch.cat(samples)
    errors = [(p(x) - program(x)).norm() for p in (calibrated, rounded)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_journal_keeps_every_expert(tmp_path, monkeypatch, sequential):
    program, samples = experts(), list(torch.randn(2, 96, 32))
    journal = Journal(tmp_path)
    first, records = calibrate(program, samples, journal=journal, sequential=sequential)
    monkeypatch.setattr(Gptq, "quantize", None)
    monkeypatch.setattr(Stream, "observe", None)
    again, same = calibrate(program, samples, journal=journal, sequential=sequential)
    assert torch.equal(decoded(first, "down"), decoded(again, "down"))
    assert same == records


def test_float_hessians_of_experts_are_found_by_a_second_recipe(tmp_path, monkeypatch):
    program, samples = experts(), list(torch.randn(2, 96, 32))
    journal = Journal(tmp_path)
    calibrate(program, samples, journal=journal, sequential="none")
    options = {"sequential": "none", "options": {"act_order": True}}
    expected, _ = calibrate(program, samples, **options)
    monkeypatch.setattr(Stream, "observe", None)
    found, _ = calibrate(program, samples, journal=journal, **options)
    assert torch.equal(decoded(found, "up"), decoded(expected, "up"))
    assert torch.equal(decoded(found, "down"), decoded(expected, "down"))


def test_inputs_of_experts_that_are_not_finite_name_the_weight():
    program = experts()
    program.weights.put("up", torch.full((4, 48, 32), 1e38))
    with pytest.raises(ModelError, match=r"the input of down, is not finite"):
        calibrate(program, list(torch.randn(2, 96, 32)), sequential="none")


def test_formats_of_single_matrices_leave_experts_float():
    _, records = PassManager([QuantizeWeights("int4-g16+2xfp16", method="owq")]).run(
        experts(), Context(calibration=Calibration(ExampleInputs([torch.randn(64, 32)])))
    )
    reasons = {skip.node: skip.reason for skip in records[0].result.skips}
    assert reasons["up"] == "format int4-g16+2xfp16 stores single matrices, no stacks"


def test_method_that_chooses_formats_leaves_experts_the_one_that_they_are_given(tmp_path):
    program = experts()
    up = program.weights.materialize("up").clone()
    up[2] = torch.randn(48, 32).sign() * torch.exp2(torch.randint(-3, 4, (48, 32)).float())
    program.weights.put("up", up)
    samples = list(torch.randn(3, 128, 32))
    step = QuantizeWeights("fp4", method="llm_fp4", ignore=["router*", "shared*"])
    context = Context(calibration=Calibration(ExampleInputs(samples), journal=Journal(tmp_path)))
    after = PassManager([step]).run(program, context)[0]
    call = next(after.calls(dialect.experts))
    assert stored_weight(call.args[3]).format == parse_format("fp4")
    hessian = Hessian()
    hessian.update(torch.cat(list(routed_rows(program, samples, 2))))
    task = Task("w", up[2], parse_format("fp4"), "absmax", Inputs(hessian))
    assert LlmFp4().quantize(task).weight.format == parse_format("e3m0")
    expected = LlmFp4().quantize(replace(task, alone=False)).weight
    torch.testing.assert_close(decoded(after, "up")[2], expected.format.decode(expected))
