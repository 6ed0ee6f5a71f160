"""Small modules before and after a pass, as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from torch import nn

from qcompile.frontends.torch_export import capture_module
from qcompile.ir.program import Program
from qcompile.passes.canonicalize import canonicalize
from qcompile.passes.infra import Pass, run_passes

After = Callable[..., Program]
Same = Callable[[Program, str], None]


@pytest.fixture
def after() -> After:
    """``after(pass, module, example)``: the canonical program of a module after passes."""

    def run(items: Pass | Sequence[Pass], model: nn.Module, example: Any) -> Program:
        passes = [items] if isinstance(items, Pass) else items
        program = run_passes(canonicalize(capture_module(model.eval(), example)), passes)
        program.verify(shapes=True)
        return program

    return run


@pytest.fixture
def expect_body() -> Same:
    """``expect_body(program, text)``: compares the text form without its first line."""

    def compare(program: Program, expected: str) -> None:
        body = program.text().split("\n", 1)[1]
        assert textwrap.dedent(body).strip() == textwrap.dedent(expected).strip()

    return compare
