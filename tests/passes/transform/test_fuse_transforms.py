from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import qcompile as qc
from qcompile.ir import dialect
from qcompile.ir.interpreter import Interpreter
from qcompile.ir.program import Program
from qcompile.passes.equivalence import checks_for
from qcompile.passes.infra import Context, PassManager, PassResult
from qcompile.passes.transform.fuse_transforms import FuseTransforms
from qcompile.passes.transform.insert import insert_before, transform_value
from qcompile.passes.transform.values import (
    Compose,
    Diagonal,
    Hadamard,
    Permutation,
    Shift,
    Transform,
)

WIDTH = 8
LINEAR = torch.ops.aten.linear.default


class Chain(nn.Module):
    """Two linears, and a sum that reads the value between them too where asked for."""

    def __init__(self, *, tapped: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.tapped = tapped

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        out: Tensor = self.second(y)
        return out + y.sum(-1, keepdim=True) if self.tapped else out


def captured(*, tapped: bool = False) -> Program:
    torch.manual_seed(0)
    return qc.capture(Chain(tapped=tapped), torch.randn(2, 4))


def values() -> dict[str, Transform]:
    scale = Diagonal(torch.linspace(0.5, 2, WIDTH, dtype=torch.float64))
    shift = Shift(torch.linspace(-1, 1, WIDTH, dtype=torch.float64))
    return {
        "diagonal": scale,
        "shift": shift,
        "permutation": Permutation(torch.arange(WIDTH).flip(0)),
        "hadamard": Hadamard(WIDTH, WIDTH, torch.tensor([1, -1] * 4, dtype=torch.int8)),
        "composition": Compose((scale, shift, Hadamard(WIDTH, 4))),
    }


def fused(program: Program) -> tuple[Program, PassResult]:
    """After fusing, with every rewrite proved."""
    context = Context(checks=checks_for("full"))
    after, records = PassManager([FuseTransforms()]).run(program, context)
    return after, records[-1].result


def run(program: Program) -> Tensor:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Interpreter(program, dtype=torch.float64).run(x)[0]


def between(program: Program) -> fx.Node:
    return next(program.calls(LINEAR))


@pytest.mark.parametrize("kind", values())
def test_transform_and_its_inverse_leave_no_node(kind: str) -> None:
    before = captured()
    program = before.copy()
    node = transform_value(program, between(program), values()[kind], "t")
    transform_value(program, node, values()[kind].inverse(), "t")
    after, _ = fused(program)
    assert not list(after.calls(dialect.transform))
    # Rounding of scales and their reciprocals, in float64.
    torch.testing.assert_close(run(after), run(before), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", values())
def test_transform_between_linears_goes_into_the_weight_in_front(kind: str) -> None:
    program = captured()
    transform_value(program, between(program), values()[kind], "t")
    expected = run(program)
    after, result = fused(program)
    assert not list(after.calls(dialect.transform))
    assert result.rewrites == 1
    torch.testing.assert_close(run(after), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", values())
def test_transform_that_only_one_reader_sees_goes_into_the_weight_behind(kind: str) -> None:
    program = captured(tapped=True)
    second = list(program.calls(LINEAR))[1]
    node = insert_before(program, [second], values()[kind])
    node.meta = {"val": node.meta["val"]}  # no longer marked to stay
    expected = run(program)
    after, _ = fused(program)
    assert not list(after.calls(dialect.transform))
    assert ("_bias" in after.text()) == (kind in ("shift", "composition"))
    torch.testing.assert_close(run(after), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", values())
def test_inserting_before_a_linear_keeps_the_function(kind: str) -> None:
    before = captured(tapped=True)
    program = before.copy()
    insert_before(program, [list(program.calls(LINEAR))[1]], values()[kind])
    torch.testing.assert_close(run(program), run(before), rtol=0, atol=1e-13)


def test_two_online_transforms_become_one_node() -> None:
    program = captured(tapped=True)
    second = list(program.calls(LINEAR))[1]
    for kind in ("diagonal", "hadamard"):
        insert_before(program, [second], values()[kind])
    expected = run(program)
    after, result = fused(program)
    (node,) = after.calls(dialect.transform)
    assert node.args[2] == "compose+diagonal+hadamard"
    assert result.details[0]["kind"] == "compose+diagonal+hadamard"
    assert result.details[0]["parameter_bits"] == WIDTH * 32 + WIDTH * 8
    torch.testing.assert_close(run(after), expected, rtol=0, atol=1e-13)


def test_transform_that_nothing_absorbs_stays_with_its_reason() -> None:
    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sort(x.tanh(), dim=-1).values

    program = qc.capture(Sorted(), torch.randn(2, 4))
    tanh = next(node for node in program.calls() if node.args[0] in program.inputs)
    transform_value(program, tanh, Diagonal(torch.full((4,), 2.0, dtype=torch.float64)), "t")
    after, result = fused(program)
    assert len(list(after.calls(dialect.transform))) == 1
    assert [skip.reason for skip in result.skips] == [
        "no weight beside it can absorb the transform"
    ]


def test_order_that_does_not_fit_is_refused() -> None:
    program = captured()
    with pytest.raises(ValueError, match="order 4 before"):
        insert_before(program, [list(program.calls(LINEAR))[1]], Hadamard(4, 4))
