"""Weights quantized in sequence: on which inputs, in which order, and once only."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from qcompile.calibration.journal import Journal
from qcompile.calibration.samples import ExampleInputs
from qcompile.calibration.settings import Calibration
from qcompile.calibration.statistics import Hessian
from qcompile.calibration.stream import Stream
from qcompile.errors import DataError, ModelError
from qcompile.formats import QuantizedWeight, parse_format
from qcompile.frontends.torch_export import capture_module
from qcompile.passes.infra import Context, PassManager, run_passes
from qcompile.passes.quantize.methods import Task
from qcompile.passes.quantize.methods.gptq import Gptq
from qcompile.passes.quantize.methods.hessian import Inputs
from qcompile.passes.quantize.methods.slim import Slim
from qcompile.passes.quantize.quantize_weights import QuantizeWeights
from qcompile.pipeline import front_phases

FORMAT = parse_format("int3-g16-asym")


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + self.second(torch.relu(self.first(x)))


def make():
    """Two residual blocks of width 24, and 4 x 32 rows of data."""
    torch.manual_seed(0)
    program = capture_module(nn.Sequential(Block(24), Block(24)), torch.randn(5, 24))
    for phase in front_phases():
        program = run_passes(program, list(phase.passes))
    return program, ExampleInputs(list(torch.randn(4, 32, 24)))


def quantize(program, data, journal=None, memory_limit=None, **options):
    """The program after GPTQ, and the record of each weight."""
    step = QuantizeWeights(FORMAT, method="gptq", **options)
    context = Context(calibration=Calibration(data, memory_limit, journal))
    after, records = PassManager([step]).run(program, context)
    return after, {detail["weight"]: detail for detail in records[0].result.details}


def tensors(program):
    return {name: program.weights.materialize(name) for name in program.weights}


def assert_same(one, other):
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def gptq(weight, x):
    """The weight as it is decoded after GPTQ on inputs x."""
    hessian = Hessian()
    for part in x.split(32):
        part_hessian = Hessian()
        part_hessian.update(part)
        hessian.merge(part_hessian)
    outcome = Gptq().quantize(Task("w", weight, FORMAT, "absmax", Inputs(hessian)))
    return FORMAT.decode(outcome.weight)


def decoded(after, name):
    shape = after.weights.spec(f"{name}.codes").shape
    parts = {p: after.weights.materialize(f"{name}.{p}") for p in ("codes", "scale", "zero_point")}
    return FORMAT.decode(QuantizedWeight(FORMAT, shape, parts))


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_inputs_have_gone_through_the_quantized_weights_that_they_should(sequential):
    program, data = make()
    after, _ = quantize(program, data, sequential=sequential)
    x = torch.cat(data.samples)
    for block in range(2):
        first, second = (
            program.weights.materialize(f"{block}.{n}.weight") for n in ("first", "second")
        )
        bias = program.weights.materialize(f"{block}.first.bias")
        quantized_first = gptq(first, x)
        seen = quantized_first if sequential == "layer" else first
        quantized_second = gptq(second, torch.relu(x @ seen.T + bias))
        assert torch.equal(decoded(after, f"{block}.first.weight"), quantized_first)
        assert torch.equal(decoded(after, f"{block}.second.weight"), quantized_second)
        if sequential == "none":
            quantized_first, quantized_second = first, second
        x = x + torch.relu(x @ quantized_first.T + bias) @ quantized_second.T


@pytest.mark.parametrize("sequential", ["block", "none"])
def test_second_round_goes_through_the_weights_of_the_first(sequential):
    program, data = make()
    first_round, _ = quantize(program, data, sequential=sequential)
    after, _ = quantize(program, data, sequential=sequential, rounds=2)
    x = torch.cat(data.samples)
    for block in range(2):
        names = [f"{block}.{n}.weight" for n in ("first", "second")]
        first, second = (program.weights.materialize(name) for name in names)
        bias = program.weights.materialize(f"{block}.first.bias")
        quantized = gptq(first, x)
        assert torch.equal(decoded(after, names[0]), quantized)
        inner = torch.relu(x @ decoded(first_round, names[0]).T + bias)
        assert torch.equal(decoded(after, names[1]), gptq(second, inner))
        known = after if sequential == "block" else first_round
        in_use = [decoded(known, name) for name in names]
        x = x + torch.relu(x @ in_use[0].T + bias) @ in_use[1].T


class Shared(nn.Module):
    """One linear in two places, and another one that reads what the first place does."""

    def __init__(self, width):
        super().__init__()
        self.shared = nn.Linear(width, width, bias=False)
        self.other = nn.Linear(width, width, bias=False)

    def forward(self, x):
        y = torch.relu(self.shared(x)) + self.other(x)
        return y + self.shared(y)


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_shared_weight_is_calibrated_on_what_all_its_places_read(tmp_path, sequential):
    torch.manual_seed(0)
    program = capture_module(Shared(24), torch.randn(5, 24))
    for phase in front_phases():
        program = run_passes(program, list(phase.passes))
    data = ExampleInputs(list(torch.randn(4, 32, 24)))
    after, _ = quantize(program, data, Journal(tmp_path), sequential=sequential)
    shared, other = (program.weights.materialize(f"{n}.weight") for n in ("shared", "other"))
    seen = gptq(other, torch.cat(data.samples)) if sequential == "layer" else other
    hessians = [Hessian(), Hessian()]
    for x in data.samples:
        y = torch.relu(x @ shared.T) + x @ seen.T
        for hessian, rows in zip(hessians, (x, y), strict=True):
            hessian.update(rows)
    hessians[0].merge(hessians[1])
    outcome = Gptq().quantize(Task("w", shared, FORMAT, "absmax", Inputs(hessians[0])))
    assert torch.equal(decoded(after, "shared.weight"), FORMAT.decode(outcome.weight))
    assert_same(after, quantize(program, data, Journal(tmp_path), sequential=sequential)[0])


def test_record_tells_method_and_errors():
    program, data = make()
    _, records = quantize(program, data)
    record = records["0.first.weight"]
    assert record["method"] == "gptq"
    assert 0 < record["output_error"] < record["relative_error"]


def test_threads_and_memory_limit_do_not_change_a_bit(tmp_path):
    program, data = make()
    expected, _ = quantize(program, data)
    before = torch.get_num_threads()
    try:
        for threads, limit in ((3, None), (1, 0), (2, 0)):
            torch.set_num_threads(threads)
            after, _ = quantize(program, data, Journal(tmp_path / f"{threads}"), limit)
            assert_same(after, expected)
    finally:
        torch.set_num_threads(before)


def count(monkeypatch, owner, name):
    """Lets a method count its calls."""
    calls = []
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("sequential", ["layer", "block", "none"])
def test_journal_spares_all_work_the_second_time(tmp_path, monkeypatch, sequential):
    program, data = make()
    journal = Journal(tmp_path)
    first, records = quantize(program, data, journal, sequential=sequential)
    swept, observed = count(monkeypatch, Gptq, "quantize"), count(monkeypatch, Stream, "observe")
    again, same_records = quantize(program, data, journal, sequential=sequential)
    assert_same(first, again)
    assert same_records == records
    assert not swept
    assert not observed


def test_other_data_or_options_or_weights_are_not_taken_for_known(tmp_path, monkeypatch):
    program, data = make()
    journal = Journal(tmp_path)
    quantize(program, data, journal)
    swept = count(monkeypatch, Gptq, "quantize")
    quantize(program, data, journal, options={"damping": 0.02})
    assert len(swept) == 4
    quantize(program, ExampleInputs([x + 1e-6 for x in data.samples]), journal)
    assert len(swept) == 8
    changed = program.copy()
    changed.weights.put("1.first.bias", program.weights.materialize("1.first.bias") + 1)
    quantize(changed, data, journal)
    assert len(swept) == 9  # only what comes after the changed bias


def test_second_recipe_on_float_inputs_finds_the_hessians(tmp_path, monkeypatch):
    program, data = make()
    journal = Journal(tmp_path)
    quantize(program, data, journal, sequential="none")
    observed, swept = count(monkeypatch, Stream, "observe"), count(monkeypatch, Gptq, "quantize")
    quantize(program, data, journal, sequential="none", options={"act_order": True})
    assert len(swept) == 4
    assert not observed


def test_methods_that_look_at_rows_get_some_from_data_or_journal(tmp_path, monkeypatch):
    program, data = make()
    seen = []

    def look(self, task):
        seen.append(task.seen.rows)
        return Gptq.quantize(self, task)

    monkeypatch.setattr(Slim, "quantize", look)
    step = {"method": "slim", "sequential": "none"}
    for options in ({}, {"act_order": True}):  # the second time statistics are found again
        rounding = QuantizeWeights(FORMAT, **step, options=options)
        context = Context(calibration=Calibration(data, journal=Journal(tmp_path)))
        PassManager([rounding]).run(program, context)
    inputs = torch.cat(data.samples)
    assert len(seen) == 8
    for rows, again in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(rows, again)
    assert all((inputs == row).all(1).any() for row in seen[0])  # the first layer reads the data


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[2])
    from pathlib import Path
    import test_calibrated as t

    class Dying(t.Journal):
        left = int(sys.argv[3])

        def put(self, key, tensors):
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            super().put(key, tensors)

    t.torch.set_num_threads(1)
    program, data = t.make()
    t.quantize(program, data, Dying(Path(sys.argv[1])))
"""


@pytest.mark.parametrize("survivors", [1, 3])
def test_killed_run_goes_on_at_the_last_finished_linear(tmp_path, monkeypatch, survivors):
    arguments = [str(tmp_path), os.path.dirname(__file__), str(survivors)]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), *arguments]
    assert subprocess.run(command, check=False).returncode == -9
    swept = count(monkeypatch, Gptq, "quantize")
    program, data = make()
    resumed, _ = quantize(program, data, Journal(tmp_path))
    assert len(swept) == 4 - survivors
    assert_same(resumed, quantize(program, data)[0])


def test_missing_data_is_an_error_that_says_what_to_pass():
    program, _ = make()
    with pytest.raises(DataError, match="method 'gptq' needs calibration data") as caught:
        quantize(program, None)
    assert "calibration=" in str(caught.value.remedy)


def test_inputs_that_are_not_finite_name_the_weight():
    program, data = make()
    program.weights.put("0.second.weight", torch.full((24, 24), 1e38))
    with pytest.raises(ModelError, match=r"input of 1\.first\.weight, is not finite"):
        quantize(program, data, ignore=["0.second"])


def test_embeddings_are_rounded_to_nearest_beside_calibrated_layers(untied, ids):
    step = QuantizeWeights("int4-g16", method="gptq", embedding="int8")
    context = Context(calibration=Calibration(ExampleInputs([ids])))
    _, records = PassManager([step]).run(untied, context)
    methods = {d["weight"]: d["method"] for d in records[0].result.details}
    assert methods["embed.weight"] == "rtn"
    assert methods["gate.weight"] == methods["head.weight"] == "gptq"
