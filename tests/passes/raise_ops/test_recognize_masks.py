"""Masks become attributes only where they are exactly what the attribute says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompile.frontends.symbolic_trace import SymbolicTracer
from qcompile.ir.program import Program
from qcompile.ir.types import Fact, Port, Role, Signature
from qcompile.ir.weights import WeightStore
from qcompile.passes.infra import Context
from qcompile.passes.raise_ops.recognize_masks import RecognizeMasks

HEADS, WIDTH = 2, 4

Mask = Callable[[Tensor, Tensor], Tensor]
"""``mask(position of query [S, 1], position of key [T])``: True where they may meet."""


def causal(query: Tensor, key: Tensor) -> Tensor:
    return key <= query


def window(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 6)


def long_window(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key > query - 40)


def inclusive_window(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (query - key <= 6)


def two_sided_window(query: Tensor, key: Tensor) -> Tensor:
    return (query - key).abs() <= 6


def chunks(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (key // 6 == query // 6)


def strictly_causal(query: Tensor, key: Tensor) -> Tensor:
    return (key < query) | (key == 0)


def prefix(query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) | (key < 5)


class Module(torch.nn.Module):
    """Attention of embedded ids to a past and themselves, under a mask."""

    def __init__(self, mask: Mask, additive: bool, padded: bool) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(10, HEADS * WIDTH))
        self.mask = mask
        self.additive = additive
        self.padded = padded

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        batch, query = input_ids.shape
        past = attention_mask.shape[1] - query
        x = torch.embedding(self.table, input_ids).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        given = x.new_empty((batch, HEADS, past, WIDTH))
        keys = torch.ops.qc.kv_append(given, x)
        positions = torch.arange(past, past + query).unsqueeze(-1)
        mask = self.mask(positions, torch.arange(past + query))[None, None]
        if self.padded:
            mask = mask & attention_mask.bool()[:, None, None, :]
        if self.additive:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        rest = (None, None, 0.5, False, 0, 0.0)
        return [torch.ops.qc.attention(x, keys, keys, mask, *rest), given]


def program_of(mask: Mask, *, additive: bool = False, padded: bool = True) -> Program:
    model = Module(mask, additive, padded)
    store = WeightStore()
    store.put("table", model.table)
    tracer = SymbolicTracer("batch", "query", "past")
    shapes = {"input_ids": ("batch", "query"), "attention_mask": ("batch", "past + query")}
    graph = tracer.trace(model, shapes, model.forward, store, str).graph
    past = _as_input(graph)
    ports = (
        Port("input_ids", Role.INPUT_IDS),
        Port("attention_mask", Role.ATTENTION_MASK),
        Port("past", Role.PAST_KEY, 0),
    )
    assert past.op == "placeholder"
    facts = frozenset({Fact.CANONICAL})
    return Program(graph, store, Signature(ports, (Port("logits", Role.LOGITS),)), facts)


def _as_input(graph: fx.Graph) -> fx.Node:
    """Makes the second result, an empty tensor, an input."""
    output = next(reversed(graph.nodes))
    result, given = output.args[0]
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        past = graph.placeholder("past")
    past.meta = dict(given.meta)
    given.replace_all_uses_with(past)
    graph.erase_node(given)
    output.args = ((result,),)
    return past


def attention_of(program: Program) -> fx.Node:
    (node,) = program.calls(torch.ops.qc.attention.default)
    return node


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("mask", "size"), [(causal, 0), (window, 6), (inclusive_window, 7), (long_window, 40)]
)
def test_mask_becomes_attributes(mask: Mask, size: int, padded: bool, additive: bool) -> None:
    program = program_of(mask, additive=additive, padded=padded)
    result = RecognizeMasks().run(program, Context())

    assert result.rewrites == 1
    node = attention_of(program)
    key_mask = program.inputs[1] if padded else None
    assert (node.args[3], node.args[4], *node.args[7:9]) == (None, key_mask, True, size)


@pytest.mark.parametrize("mask", [two_sided_window, chunks, strictly_causal, prefix])
def test_mask_of_another_kind_stays_an_operand(mask: Mask) -> None:
    program = program_of(mask)
    result = RecognizeMasks().run(program, Context())

    assert result.rewrites == 0
    assert isinstance(attention_of(program).args[3], fx.Node)
    assert [skip.reason for skip in result.skips] == [
        "a mask that is no padding, causal or window mask"
    ]


def test_mask_that_stays_is_right_for_other_lengths() -> None:
    program = program_of(chunks)
    RecognizeMasks().run(program, Context())
    model = Module(chunks, additive=False, padded=True)
    model.table = torch.nn.Parameter(program.weights.materialize("table"))

    for past, query in ((0, 9), (11, 3)):
        ids, mask = torch.randint(10, (2, query)), torch.ones(2, past + query, dtype=torch.int64)
        before = torch.randn(2, HEADS, past, WIDTH)
        x = model.table[ids].unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        keys = torch.cat((before, x), 2)
        allowed = chunks(torch.arange(past, past + query).unsqueeze(-1), torch.arange(past + query))
        expected = torch.nn.functional.scaled_dot_product_attention(
            x, keys, keys, allowed, scale=0.5
        )
        found: Any = program(ids, mask, past_key_values=(before,))
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
