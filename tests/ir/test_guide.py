"""The guide to the intermediate representation is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tests.guides import assert_guide_is_true

from qcompile.ir import dialect

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "ir.md"


def test_guide_runs_and_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert_guide_is_true(GUIDE, capsys)


def test_guide_lists_every_operator_of_the_dialect() -> None:
    defined = {
        str(value._schema.name)
        for value in vars(dialect).values()
        if isinstance(value, torch._ops.OpOverload)
    }
    listed = {f"qc::{name}" for name in re.findall(r"^\| `qc\.(\w+)\(", GUIDE.read_text(), re.M)}
    assert listed == defined


def test_guide_lists_the_operands_of_every_operator() -> None:
    for name, operands in re.findall(r"^\| `qc\.(\w+)\((.*?)\)`", GUIDE.read_text(), re.M):
        schema = getattr(torch.ops.qc, name).default._schema
        # q, k and v are short for query, key and value.
        given = [operand.strip(" ?") for operand in operands.split(",")]
        full = {"q": "query", "k": "key", "v": "value"}
        assert [full.get(operand, operand) for operand in given] == [
            argument.name for argument in schema.arguments
        ]
