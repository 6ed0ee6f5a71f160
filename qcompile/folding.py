"""Many names as few: what repeats by layer is written once."""

from __future__ import annotations

import math
from collections.abc import Iterable


def fold_names(names: Iterable[str]) -> list[str]:
    """Dotted names that differ only in numbers, written once with the numbers' ranges.

    Example:
        >>> fold_names(["layers.0.up", "head", "layers.1.up", "layers.2.up"])
        ['layers.[0-2].up', 'head']
    """
    groups: dict[_Template, list[tuple[int, ...]]] = {}
    for name in dict.fromkeys(names):
        parts = name.split(".")
        numbers = tuple(int(part) for part in parts if part.isdecimal())
        template = tuple(None if part.isdecimal() else part for part in parts)
        groups.setdefault(template, []).append(numbers)
    return [line for template, found in groups.items() for line in _fold(template, found)]


def fold_numbers(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges: ``0-2,5``; with a step where that is shorter: ``0-10/2``."""
    ordered = sorted(set(numbers))
    if len(ordered) > 2:
        step = ordered[1] - ordered[0]
        if step > 1 and ordered == list(range(ordered[0], ordered[-1] + 1, step)):
            return f"{ordered[0]}-{ordered[-1]}/{step}"
    ranges: list[tuple[int, int]] = []
    for number in ordered:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], number
        else:
            ranges.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


_Template = tuple[str | None, ...]
"""The parts of a name; None stands for a number."""


def _fold(template: _Template, found: list[tuple[int, ...]]) -> list[str]:
    """One line where every combination of the numbers occurs, else one by leading number."""
    columns = [sorted(set(column)) for column in zip(*found, strict=True)]
    if math.prod(map(len, columns)) == len(found):
        return [_write(template, columns)]
    varying = next(i for i, column in enumerate(columns) if len(column) > 1)
    groups: dict[int, list[tuple[int, ...]]] = {}
    for numbers in found:
        groups.setdefault(numbers[varying], []).append(numbers)
    return [line for group in groups.values() for line in _fold(template, group)]


def _write(template: _Template, columns: list[list[int]]) -> str:
    ranges = (
        str(numbers[0]) if len(numbers) == 1 else f"[{fold_numbers(numbers)}]"
        for numbers in columns
    )
    return ".".join(next(ranges) if part is None else part for part in template)
