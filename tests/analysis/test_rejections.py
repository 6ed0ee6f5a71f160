"""One rejected site for every reason that the analysis gives."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.analysis.test_sites import language_model
from torch import Tensor, nn
from torch.nn import functional

import qcompile.analysis
from qcompile.analysis.families import Family
from qcompile.analysis.sites import find_sites
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import run_passes
from qcompile.passes.quantize.quantize_cache import QuantizeCache
from qcompile.passes.raise_ops import raise_program

P, D, R, S = Family.PERMUTATION, Family.DIAGONAL, Family.ORTHOGONAL, Family.SHIFT

Function = Callable[["Layers", Tensor], Any]


class Layers(nn.Module):
    """Twelve channels between two layers, and what a function makes of them."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.other, self.square = nn.Linear(6, 12), nn.Linear(12, 12)
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 3)
        self.grouped = nn.Conv2d(12, 4, 3, groups=2)
        self.table = nn.Embedding(5, 12)
        self.gain = nn.Parameter(torch.rand(12))
        self.experts_up = nn.Parameter(torch.randn(3, 8, 12))
        self.experts_bias = nn.Parameter(torch.randn(3, 8))
        self.experts_down = nn.Parameter(torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def program_of(function: Function, x: Tensor | None = None) -> Program:
    torch.manual_seed(0)
    example = torch.randn(4, 6) if x is None else x
    return raise_program(canonicalize(capture_module(Layers(function), (example,))))


def between(function: Function) -> Callable[[], Program]:
    """``down(function(up(x)))``."""
    return lambda: program_of(lambda m, x: m.down(function(m, m.up(x))))


def beside(function: Function) -> Callable[[], Program]:
    """``down(up(x))`` and ``function(up(x))``."""

    def both(m: Layers, x: Tensor) -> tuple[Tensor, Any]:
        hidden = m.up(x)
        return m.down(hidden), function(m, hidden)

    return lambda: program_of(both)


def images(function: Function) -> Callable[[], Program]:
    """``second(first(x))`` and ``function(first(x))``."""

    def both(m: Layers, x: Tensor) -> tuple[Tensor, Any]:
        hidden = m.first(x)
        return m.second(hidden), function(m, hidden)

    return lambda: program_of(both, torch.randn(2, 3, 7, 7))


def experts(bias: bool = False, computed: bool = False) -> Callable[[], Program]:
    def function(m: Layers, x: Tensor) -> Tensor:
        hidden = m.up(x)
        index = torch.argsort(hidden, dim=-1)[:, :2] % 3
        weights = torch.softmax(hidden[:, :2], dim=-1)
        up = m.experts_up * x.sum() if computed else m.experts_up
        made = dialect.experts(
            hidden,
            index,
            weights,
            *(up, m.experts_bias if bias else None, m.experts_down, None),
            *("silu", False, 0.0, 0.0),
        )
        return m.down(made) + m.down(hidden)

    return lambda: program_of(function)


def attended(function: Callable[[Tensor], Any]) -> Callable[[], Program]:
    """Attention over three heads of four channels; a function sees ``[B, H, T, D]``."""

    def attend(m: Layers, x: Tensor) -> tuple[Tensor, Any]:
        qkv = [m.up(x).reshape(-1, 5, 3, 4).transpose(1, 2) for _ in range(3)]
        mixed = dialect.attention(*qkv, None, None, None, 0.5, False, 0, 0.0)
        return m.down(mixed.transpose(1, 2).reshape(-1, 5, 12)), function(mixed)

    # As it is captured: later passes write splits as slices.
    return lambda: capture_module(Layers(attend), (torch.randn(2, 5, 6),))


def tied() -> Program:
    """What a table writes, the table reads."""

    def function(m: Layers, x: Tensor) -> Tensor:
        return functional.linear(m.table((x[:, 0] * 0).long()), m.table.weight)

    return program_of(function)


@lru_cache(maxsize=1)
def llama() -> Program:
    return language_model("Llama", tie_word_embeddings=False)


def cached() -> Program:
    return run_passes(llama(), [QuantizeCache("int8")])


REASONS: dict[str, tuple[Family, Callable[[], Program]]] = {
    # Layers.
    "the weight of the linear is computed or quantized": (
        P,
        beside(lambda m, h: functional.linear(h, h.T @ h)),
    ),
    "its bias is computed": (
        P,
        lambda: program_of(
            lambda m, x: m.down(functional.linear(x, m.up.weight, m.up.bias * x.sum()))
        ),
    ),
    "a grouped convolution": (P, images(lambda m, h: m.grouped(h))),
    "the weight is computed": (P, images(lambda m, h: functional.conv2d(h, h[:, :, :3, :3]))),
    "a convolution pads with zeros": (S, images(lambda m, h: h)),
    "the table is computed or quantized": (
        P,
        lambda: program_of(
            lambda m, x: m.down(
                m.up(x) + functional.embedding(x[:, 0].long() % 5, m.table.weight * x.sum())
            )
        ),
    ),
    "the experts' weights are computed": (P, experts(computed=True)),
    "routed experts share no bias": (S, experts()),
    "inside the experts an activation is applied": (R, experts()),
    "inside the experts values are clamped or shifted": (D, experts(bias=True)),
    # Heads.
    "a rotary embedding mixes channels in pairs": (R, llama),
    "the cache holds it without a shift": (S, llama),
    "the cache rounds it to": (P, cached),
    "queries are multiplied by keys": (S, llama),
    "a query that may attend to nothing gives zeros": (S, llama),
    "heads are split unevenly": (P, attended(lambda mixed: torch.split(mixed, [1, 2], dim=1)[1])),
    # Elementwise.
    "the other operand of the sum takes the shift": (S, llama),
    "it is scaled, and a shift would be, too": (S, between(lambda m, h: h * 2)),
    "a gain works on single channels": (R, between(lambda m, h: h * m.gain)),
    "channels are multiplied one by one": (R, llama),
    "a nonlinear function of it is multiplied": (
        D,
        lambda: program_of(
            lambda m, x: m.down(dialect.gated_act(m.up(x), m.other(x), "silu")) + m.down(m.up(x))
        ),
    ),
    "relu works on single channels": (R, between(lambda m, h: torch.relu(h))),
    # Norms.
    "a norm works on each head by itself": (
        P,
        beside(lambda m, h: dialect.rms_norm(h.reshape(-1, 3, 4), m.gain[:4], 1e-6)),
    ),
    "the mean square of the norm weighs all channels alike": (D, llama),
    "the norm's gain is computed": (
        P,
        between(lambda m, h: dialect.rms_norm(h, h[0], 1e-6)),
    ),
    "the norm has no bias to absorb a shift": (
        S,
        between(lambda m, h: dialect.layer_norm(h, m.gain, None, 1e-6)),
    ),
    "the norm has no gain to absorb a scale": (
        D,
        between(lambda m, h: dialect.rms_norm(h, None, 1e-6)),
    ),
    "the norm's gain feeds": (R, lambda: language_model("Olmo2", tie_word_embeddings=False)),
    # Moves.
    "a sum adds shifts up": (S, between(lambda m, h: h.sum(0, keepdim=True))),
    # What is unknown, and the ends of a program.
    "needs it as it is": (P, beside(lambda m, h: torch.sort(h, dim=-1).values)),
    "it is the input": (
        P,
        lambda: program_of(lambda m, x: m.square(m.square(x)), torch.randn(4, 12)),
    ),
    "it comes from": (P, between(lambda m, h: h + torch.sort(h, dim=-1).values)),
    "it is the output": (P, beside(lambda m, h: h)),
    # Contradictions.
    "it would have to be scaled by s and by 1 / s": (D, tied),
    "a weight that writes to it reads it as well": (S, tied),
}


@pytest.mark.parametrize("reason", REASONS)
def test_site_is_rejected_with_its_reason(reason: str) -> None:
    family, make = REASONS[reason]
    rejected = [
        site
        for site in find_sites(make())
        if any(b.family is family and reason in b.reason for b in site.blockers)
    ]
    assert rejected
    assert all(family not in site.families for site in rejected)


def test_every_reason_of_the_analysis_is_among_them() -> None:
    given = set(_reasons(Path(qcompile.analysis.__path__[0])))
    missing = {text for text in given if not any(reason in text for reason in REASONS)}
    assert given
    assert not missing


def _reasons(folder: Path) -> Iterator[str]:
    """The texts of that a package's calls of `block` and `block_all` may give."""
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in ("block", "block_all") and len(node.args) > 1:
                reason = node.args[2 if node.func.attr == "block" else 1]
                found = texts.get(reason.id, reason) if isinstance(reason, ast.Name) else reason
                yield from _texts(found)


def _texts(expression: ast.expr) -> Iterator[str]:
    """The strings that an expression may be; what a format string fills in is left out."""
    match expression:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _texts(body)
            yield from _texts(orelse)
        case ast.JoinedStr(values=values):
            yield "".join(str(v.value) if isinstance(v, ast.Constant) else "relu" for v in values)
