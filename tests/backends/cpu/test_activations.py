"""The attribute `act` of nodes, and what it stands for."""

from __future__ import annotations

import pytest

from qcompile.backends.cpu.activations import FLOAT, WIDTHS, IntegerActivations


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("scales", ["token", "group", "static"])
def test_text_of_activations_is_read_back(bits: int, scales: str) -> None:
    activations = IntegerActivations(bits, scales)  # type: ignore[arg-type]  # a literal of three
    assert str(activations) == f"int{bits}_{scales}"
    assert IntegerActivations.parse(str(activations)) == activations


def test_codes_without_a_sign_are_static() -> None:
    assert IntegerActivations.parse("uint4_static") == IntegerActivations(4, "static", signed=False)


def test_float_activations_are_not_rounded() -> None:
    assert IntegerActivations.parse(FLOAT) is None


@pytest.mark.parametrize("act", ["int9_token", "uint4_token", ""])
def test_other_texts_are_refused(act: str) -> None:
    with pytest.raises(ValueError, match="is neither 'float' nor one of int2_token"):
        IntegerActivations.parse(act)
