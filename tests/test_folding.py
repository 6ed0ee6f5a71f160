"""Names that repeat by layer are written once."""

from __future__ import annotations

import pytest

from qcompile.folding import fold_names, fold_numbers


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "3"),
        ([0, 1, 2], "0-2"),
        ([2, 0, 1, 1], "0-2"),
        ([0, 1, 4, 6, 7], "0-1,4,6-7"),
        ([0, 2, 4, 6], "0-6/2"),
        ([0, 2], "0,2"),
        ([], ""),
    ],
)
def test_numbers_become_ranges(numbers: list[int], text: str) -> None:
    assert fold_numbers(numbers) == text


def test_names_that_differ_in_numbers_become_one_in_order_of_the_first() -> None:
    names = ["layers.0.up", "head", "layers.1.up", "layers.0.down", "layers.2.up"]
    assert fold_names(names) == ["layers.[0-2].up", "head", "layers.0.down"]


def test_every_combination_of_two_numbers_is_one_name() -> None:
    names = [f"l.{i}.experts.{j}.up" for i in range(2) for j in range(4)]
    assert fold_names(names) == ["l.[0-1].experts.[0-3].up"]


def test_missing_combinations_are_not_claimed() -> None:
    names = ["l.0.e.0.up", "l.0.e.1.up", "l.1.e.0.up"]
    assert fold_names(names) == ["l.0.e.[0-1].up", "l.1.e.0.up"]


def test_missing_combinations_of_three_numbers_are_not_claimed() -> None:
    names = ["a.0.0.0", "a.0.1.1", "a.0.1.2"]
    assert fold_names(names) == ["a.0.0.0", "a.0.1.[1-2]"]


def test_numbers_inside_a_part_and_repeated_names_are_left_alone() -> None:
    assert fold_names(["h2.up", "h3.up", "h2.up", ""]) == ["h2.up", "h3.up", ""]
