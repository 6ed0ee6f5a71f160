"""Parts of a program that others compute, on values that a stream keeps for them."""

import torch

from qcompile.analysis.stages import stages
from qcompile.calibration.part import compute_node
from qcompile.calibration.requests import Request
from qcompile.calibration.statistics import Rows
from qcompile.calibration.stream import Stream


def boundaries(program):
    return [stage.boundary for stage in stages(program) if stage.boundary is not None]


def run_by_hand(stream, piece, batch, replaced=()):
    """The last value of a piece, node by node; weights are replaced by name."""
    env = {**piece.constants, **{node: stream.value(batch, node) for node in piece.reads}}
    env |= {node: dict(replaced).get(str(node.target), env[node]) for node in piece.constants}
    for node in piece.nodes:
        env[node] = compute_node(node, env)
    return env[piece.nodes[-1]]


def test_piece_computed_by_hand_is_what_the_stream_computes(blocks, samples):
    first, second = boundaries(blocks)[:2]
    with Stream(blocks, samples, [first, second]) as own, Stream(blocks, samples, [second]) as one:
        own.reach([first])
        piece = own.piece([second])
        assert piece.reads == (first,)
        found = one.observe([Request(second, lambda: Rows(every=1))]).of(second, Rows).values
        by_hand = [run_by_hand(own, piece, batch) for batch in range(own.batches)]
    torch.testing.assert_close(torch.cat(by_hand), found)


def test_values_go_when_the_next_are_reached(blocks, samples):
    first, second = boundaries(blocks)[:2]
    with Stream(blocks, samples, [first, second]) as stream:
        stream.reach([first])
        before = stream.value(0, first).clone()
        stream.reach([second])
        assert stream.value(0, second).shape == before.shape
        assert not torch.equal(stream.value(0, second), before)
        kept = [node for (_, node) in stream._store._values]
    assert first not in kept


def test_replaced_weights_count_by_hand_and_in_the_stream(blocks, samples):
    (first, *_) = boundaries(blocks)
    weight = torch.zeros(24, 48)
    with Stream(blocks, samples, [first]) as stream:
        by_hand = run_by_hand(stream, stream.piece([first]), 0, {"0.down.weight": weight}.items())
        before = stream.key([first])
        stream.override("0.down.weight", lambda: weight)
        assert stream.key([first]) != before
        stream.reach([first])
        # A block whose last weight is zero hands on what it was given.
        assert torch.equal(by_hand, samples.samples[0])
        assert torch.equal(stream.value(0, first), samples.samples[0])
