"""Canonical form: one spelling per meaning."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.ir.types import Fact
from qcompile.passes.canonicalize import canonicalize


class Module(nn.Module):
    """A function of one value, with two matrices and a vector as weights."""

    def __init__(self, function: Callable[[Module, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.a = nn.Parameter(torch.randn(4, 6))
        self.b = nn.Parameter(torch.randn(6, 4))
        self.v = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def canonical(function: Callable[[Module, Tensor], Any]) -> tuple[Program, Module, Tensor]:
    model, x = Module(function), torch.randn(2, 3, 4)
    program = canonicalize(capture_module(model, x))
    program.verify(shapes=True)
    assert Fact.CANONICAL in program.facts
    return program, model, x


def body(program: Program) -> str:
    return program.text().split("\n", 1)[1].strip()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda m, x: nn.functional.dropout(x.contiguous().clone().float(), 0.5, False) + 1,
            "%0: f32[s0, s1, s2] = aten.add(%x, 1)\n  return %0",
        ),
        (
            lambda m, x: x[:, :].view(x.shape) * 2,
            "%0: f32[s0, s1, s2] = aten.mul(%x, 2)\n  return %0",
        ),
        (
            lambda m, x: x.exp() + x.exp(),
            "%0: f32[s0, s1, s2] = aten.exp(%x)\n  %1: f32[s0, s1, s2] = aten.add(%0, %0)\n"
            "  return %1",
        ),
        (
            lambda m, x: x.permute(0, 2, 1).transpose(1, 2).neg().permute(2, 1, 0),
            "%0: f32[s0, s1, s2] = aten.neg(%x)\n"
            "  %1: f32[s2, s1, s0] = aten.transpose(%0, 0, 2)\n  return %1",
        ),
    ],
    ids=["aliases", "views", "duplicates", "permutations"],
)
def test_what_computes_nothing_is_dropped(function: Any, expected: str) -> None:
    program, model, x = canonical(function)

    assert body(program) == expected
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.parametrize(
    ("function", "weight"),
    [
        (lambda m, x: x @ m.a, "@a"),
        (lambda m, x: torch.matmul(x, m.a) + m.v, "@a, @v"),
        (lambda m, x: torch.addmm(m.v, x.view(-1, 4), m.a).view(x.shape[0], -1, 6), "@a, @v"),
        (lambda m, x: nn.functional.linear(x, 1 + m.b), "@b"),
    ],
    ids=["product", "product-and-bias", "flattened", "derived"],
)
def test_dense_layer_is_one_linear(function: Any, weight: str) -> None:
    program, model, x = canonical(function)

    assert body(program) == f"%0: f32[s0, s1, 6] = aten.linear(%x, {weight})\n  return %0"
    torch.testing.assert_close(program(x), model(x))


def test_parts_of_a_split_are_slices() -> None:
    program, model, x = canonical(lambda m, x: (x @ m.a).split([2, 4], -1)[1])

    expected = """\
        %0: f32[s0, s1, 6] = aten.linear(%x, @a)
        %1: f32[s0, s1, 4] = aten.slice(%0, -1, 2, 6, 1)
        return %1"""
    assert textwrap.dedent(body(program).replace("\n  ", "\n")) == textwrap.dedent(expected)
    torch.testing.assert_close(program(x), model(x))


def test_batched_product_with_addend_is_spelled_out() -> None:
    def function(m: Module, x: Tensor) -> Tensor:
        return torch.baddbmm(x, x, x.transpose(1, 2) @ x, beta=0.5, alpha=2.0)

    program, model, x = canonical(function)

    assert not list(program.calls(torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default))
    assert len(list(program.calls(torch.ops.aten.matmul.default))) == 2
    torch.testing.assert_close(program(x), model(x), rtol=1e-5, atol=1e-5)


def test_equal_sizes_are_one_node() -> None:
    program, model, x = canonical(lambda m, x: x.exp().new_zeros(x.shape[0], x.neg().shape[0]))

    assert len(list(program.calls(torch.ops.aten.sym_size.int))) == 1
    assert program(torch.randn(5, 3, 4)).shape == (5, 5)
    del model, x


def test_tensor_assembled_in_place_is_a_concatenation() -> None:
    def function(m: Module, x: Tensor) -> Tensor:
        whole = x.new_empty(*x.shape[:-1], 10)
        whole[..., :4] = nn.functional.linear(x, m.b[:4])
        whole[..., 4:] = x @ m.a
        return whole

    program, model, x = canonical(function)

    (node,) = program.calls(torch.ops.aten.cat.default)
    assert node in program.results
    assert not list(program.calls(torch.ops.aten.slice_scatter.default))
    torch.testing.assert_close(program(x), model(x))


def test_tensor_assembled_with_a_gap_is_left() -> None:
    def function(m: Module, x: Tensor) -> Tensor:
        whole = x.new_zeros(*x.shape[:-1], 10)
        whole[..., :3] = (x @ m.a)[..., :3]
        whole[..., 4:] = x @ m.a
        return whole

    program, model, x = canonical(function)

    assert not list(program.calls(torch.ops.aten.cat.default))
    torch.testing.assert_close(program(x), model(x))


def test_product_of_two_activations_is_no_linear() -> None:
    program, model, x = canonical(lambda m, x: x @ x.transpose(1, 2))

    assert not list(program.calls(torch.ops.aten.linear.default))
    torch.testing.assert_close(program(x), model(x))
