from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.ir.size_text import SizeReader, SizeWriter, parse

HINTS = {"s0": 12, "s1": 5, "s2": 12}

EXPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "symbol": lambda a, b: a,
    "sum": lambda a, b: 3 * a + b - 7,
    "product": lambda a, b: a * b * b,
    "quotient": lambda a, b: (a + 1) // 4,
    "remainder": lambda a, b: a % 7,
    "larger": lambda a, b: torch.sym_max(a, b + 1),
    "smaller": lambda a, b: torch.sym_min(a, 2 * b),
    "ratio": lambda a, b: a / b,
    "number": lambda a, b: torch.sym_float(a),
    "condition": lambda a, b: a * 2 > b,
    "equality": lambda a, b: a == b + 7,
}


@pytest.mark.parametrize("make", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())
def test_expression_comes_back_as_it_was(make: Callable[[Any, Any], Any]) -> None:
    source = SizeReader(HINTS)
    value = make(source.read("s0"), source.read("s1"))
    writer = SizeWriter([value])
    text = writer.write(value)
    assert isinstance(text, str)
    again = SizeReader(writer.hints).read(text)
    assert type(again) is type(value)
    assert SizeWriter([again]).write(again) == text
    # The hint is what the expression is for the examples of its symbols.
    assert again.node.hint == value.node.hint


def test_symbols_of_one_example_stay_apart() -> None:
    source = SizeReader(HINTS)
    total = source.read("s0 + s2")
    writer = SizeWriter([total])
    assert writer.write(total) == "s0 + s1"
    assert writer.hints == {"s0": 12, "s1": 12}


def test_order_of_symbols_is_kept_past_nine() -> None:
    source = SizeReader({f"s{i}": 10 + i for i in range(12)})
    total = source.read(" + ".join(f"s{i}" for i in range(12)))
    writer = SizeWriter([total])
    assert list(writer.hints.values()) == list(range(10, 22))


def test_symbol_that_depends_on_data_has_no_example() -> None:
    reader = SizeReader({"u0": None})
    size = reader.read("u0")
    assert SizeWriter([size]).hints == {"u0": None}


@pytest.mark.parametrize("value", [0, 7, 2.5, True])
def test_plain_numbers_stay_numbers(value: Any) -> None:
    assert SizeWriter([]).write(value) is value
    assert SizeReader({}).read(value) is value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s0 s1",
        "s0.real",
        "s0[0]",
        "__import__('os')",
        "Max(s0)",
        "Mod(s0, 2, 3)",
        "Max(s0, 1, key=2)",
        "Unknown(s0)",
        "lambda: 1",
        "[s0]",
        "'text'",
        "None",
        "s0 if s1 else 2",
        "2**s0",
        "s0**99",
        "s0 < s1 < 3",
        "+" * 5000 + "1",
        "-" * 200 + "1",
        str(2**80),
    ],
)
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|nested|written"):
        parse(text)


def test_undeclared_symbol_is_refused() -> None:
    with pytest.raises(ValueError, match="'s9' is not declared"):
        SizeReader(HINTS).read("s0 + s9")
