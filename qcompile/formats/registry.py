"""Formats by name, as recipes write them."""

from __future__ import annotations

import difflib
import re

import torch

from qcompile.errors import RecipeError
from qcompile.formats.base import Format
from qcompile.formats.integer import SCALE_DTYPES, IntegerFormat

_EXAMPLES = "int4-g64, int8, int4-g32-asym, int4-g64-bf16"
_FAMILY = re.compile(r"int([0-9]+)")
_GROUP = re.compile(r"g([0-9]+)")
_WORDS = ("sym", "asym", *SCALE_DTYPES)


def parse_format(text: str) -> Format:
    """Reads the name of a format.

    ``int<bits>[-g<group size>][-sym|-asym][-fp16|-bf16|-fp32]``: integers of 1 to 8 bits; one
    scale per row unless a group size is given; symmetric unless ``asym``; float16 scales unless
    another type is given. What follows the first part may come in any order.

    Args:
        text: Such as ``"int4-g64-asym-bf16"``; upper and lower case are the same.

    Returns:
        The format, whose `str` is the canonical name and reads back as an equal format.

    Raises:
        RecipeError: The name means nothing; the message says which part and suggests a remedy.
    """
    family, *options = text.strip().lower().split("-")
    match = _FAMILY.fullmatch(family)
    if match is None:
        raise _unknown(text)
    group_size, symmetric, scale_dtype = _options(text, options)
    return IntegerFormat(int(match[1]), group_size, symmetric, scale_dtype)


def _options(text: str, options: list[str]) -> tuple[int, bool, torch.dtype]:
    group_size: int | None = None
    symmetry: str | None = None
    scale: str | None = None
    for option in options:
        group = _GROUP.fullmatch(option)
        if group is not None and group_size is None and int(group[1]) > 0:
            group_size = int(group[1])
        elif option in ("sym", "asym") and symmetry is None:
            symmetry = option
        elif option in SCALE_DTYPES and scale is None:
            scale = option
        else:
            raise _bad_option(text, option)
    return group_size or 0, symmetry != "asym", SCALE_DTYPES[scale or "fp16"]


def _bad_option(text: str, option: str) -> RecipeError:
    message = f"format '{text}': cannot use '{option}'"
    if _GROUP.fullmatch(option) and int(option[1:]) == 0:
        return RecipeError(message, remedy="leave the group out for one scale per row")
    if _GROUP.fullmatch(option) or option in _WORDS:
        return RecipeError(message, remedy="give the group size, the symmetry and the scales once")
    if option.isdigit():
        return RecipeError(message, remedy=f"a group size is written g{option}")
    close = difflib.get_close_matches(option, _WORDS, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return RecipeError(
        message, remedy=f"{hint}after the bits come g<group size>, {', '.join(_WORDS)}"
    )


def _unknown(text: str) -> RecipeError:
    known = [f"int{bits}" for bits in range(1, 9)]
    family = re.split(r"[-_ ]", text.strip().lower())[0]
    close = difflib.get_close_matches(family, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return RecipeError(f"unknown format '{text}'", remedy=f"{hint}formats are named {_EXAMPLES}")
