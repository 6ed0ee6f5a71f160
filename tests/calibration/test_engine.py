"""Streams compute what the interpreter computes, whatever the threads and the memory limit."""

import math

import pytest
import torch

from qcompile.calibration.engine import Request, Stream, collect, linear_inputs
from qcompile.calibration.samples import ExampleInputs
from qcompile.calibration.statistics import ChannelRange, Hessian, Rows
from qcompile.errors import DataError, ModelError
from qcompile.ir.interpreter import Interpreter


class AllRows(Rows):
    """Every row."""

    def __init__(self, values=None, every=1):
        super().__init__(torch.empty(0) if values is None else values, 1)


def interpreted(program, data, overrides=None):
    """The value of each node on all samples together, by name."""
    found = {}

    def remember(node, value):
        found[node.name] = value
        return value

    for name, tensor in (overrides or {}).items():
        program.weights.put(name, tensor)
    Interpreter(program, hook=remember).run(torch.cat(data.samples))
    return found


def all_requests(program, kind):
    inputs = linear_inputs(program)
    return [Request(value, kind) for values in inputs.values() for value in values]


def test_collected_values_are_those_of_the_interpreter(blocks, samples):
    found = collect(blocks, samples, all_requests(blocks, AllRows))
    expected = interpreted(blocks, samples)
    assert len(found.collected) == 7
    for (name, _, _), statistic in found.collected.items():
        torch.testing.assert_close(statistic.values, expected[name])


def test_linears_that_share_an_input_share_the_statistic(blocks, samples):
    found = collect(blocks, samples, all_requests(blocks, Hessian))
    gate, up, down = (found.of_weight(f"0.{n}.weight", Hessian) for n in ("gate", "up", "down"))
    assert gate is up
    assert gate.matrix.shape == (24, 24)
    assert down.matrix.shape == (48, 48)
    assert down.count == 64


def test_inputs_of_the_program_can_be_asked_for(blocks, samples):
    (x,) = blocks.inputs
    found = collect(blocks, samples, [Request(x, ChannelRange)])
    assert torch.equal(found.of(x, ChannelRange).high, torch.cat(samples.samples).amax(0))


def test_channels_may_be_other_axes(blocks, samples):
    (x,) = blocks.inputs
    found = collect(blocks, samples, [Request(x, AllRows, channels=(-2,))])
    expected = torch.cat([sample.T for sample in samples.samples])
    assert torch.equal(found.of(x, AllRows, channels=(-2,)).values, expected)


def test_results_do_not_depend_on_threads_or_memory(blocks, samples):
    def run(threads, limit):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = collect(blocks, samples, all_requests(blocks, Hessian), memory_limit=limit)
        finally:
            torch.set_num_threads(before)
        return [statistic.sum for statistic in found.collected.values()]

    expected = run(1, None)
    for other in (run(3, None), run(1, 0), run(2, 0)):
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


def test_values_past_the_memory_limit_go_to_files_and_come_back(tmp_path):
    from qcompile.calibration.store import ActivationStore

    value = torch.randn(300, 200).T
    node = object()
    with ActivationStore(memory_limit=0, directory=tmp_path) as store:
        store.put(0, node, value)
        assert store.spilled_bytes == value.nbytes
        assert len(list(tmp_path.rglob("*"))) == 2
        assert torch.equal(store.get(0, node), value)
        store.drop(0, node)
        assert len(list(tmp_path.rglob("*"))) == 1
    assert list(tmp_path.iterdir()) == []


def test_stream_goes_on_with_replaced_weights(blocks, samples):
    inputs = linear_inputs(blocks)
    (down,) = inputs["1.down.weight"]
    (gate,) = inputs["1.gate.weight"]
    replaced = {
        name: torch.full(blocks.weights.spec(name).shape, 0.01)
        for name in ("0.down.weight", "1.gate.weight")
    }
    with Stream(blocks, samples, [gate, down]) as stream:
        stream.override("0.down.weight", lambda: replaced["0.down.weight"])
        first = stream.observe([Request(gate, AllRows)])
        stream.override("1.gate.weight", lambda: replaced["1.gate.weight"])
        second = stream.observe([Request(down, AllRows)])
    expected = interpreted(blocks, samples, replaced)
    torch.testing.assert_close(first.of(gate, AllRows).values, expected[gate.name])
    torch.testing.assert_close(second.of(down, AllRows).values, expected[down.name])


def test_stream_that_stays_can_run_the_same_part_again(blocks, samples):
    (down,) = linear_inputs(blocks)["0.down.weight"]
    with Stream(blocks, samples, [down]) as stream:
        first = stream.observe([Request(down, AllRows)], stay=True).of(down, AllRows)
        stream.override("0.up.weight", lambda: torch.zeros(48, 24))
        second = stream.observe([Request(down, AllRows)]).of(down, AllRows)
    assert float(first.values.abs().max()) > 0
    assert float(second.values.abs().max()) == 0


def test_hooks_change_what_statistics_and_later_nodes_see(blocks, samples):
    inputs = linear_inputs(blocks)
    (gate,) = inputs["0.gate.weight"]
    (down,) = inputs["0.down.weight"]
    hooks = {gate: torch.zeros_like}
    requests = [Request(gate, ChannelRange), Request(down, ChannelRange)]
    found = collect(blocks, samples, requests, hooks=hooks)
    assert float(found.of(gate, ChannelRange).absmax.max()) == 0
    assert float(found.of(down, ChannelRange).absmax.max()) == 0


def test_number_that_is_not_finite_is_told_by_node_and_weight(blocks, samples):
    samples.samples[2][3, 4] = math.inf
    with pytest.raises(ModelError, match=r"input of 0\.gate\.weight, 0\.up\.weight, is not finite"):
        collect(blocks, samples, all_requests(blocks, Hessian))


def test_data_of_the_wrong_width_is_told_by_node(blocks):
    data = ExampleInputs([torch.randn(3, 25)])
    with pytest.raises(DataError, match=r"node '.*' \(.*\) cannot run on the calibration data"):
        collect(blocks, data, all_requests(blocks, Hessian))


def test_value_that_was_not_announced_is_refused(blocks, samples):
    inputs = linear_inputs(blocks)
    with (
        Stream(blocks, samples, inputs["0.gate.weight"]) as stream,
        pytest.raises(ValueError, match="not among the targets"),
    ):
        stream.observe([Request(inputs["0.down.weight"][0], Hessian)])
