"""Formats by name, as recipes write them."""

from __future__ import annotations

import difflib
import re

import torch

from qcompile.errors import RecipeError
from qcompile.formats.base import Format
from qcompile.formats.dense import DenseFormat
from qcompile.formats.integer import FLOAT_ZERO_POINTS, IntegerFormat
from qcompile.formats.integer_scale import INTEGER_SCALES, IntegerScaleFormat
from qcompile.formats.lookup import ALIASES, STANDARD_FORMATS, LookupFormat, default_scales
from qcompile.formats.scales import SCALE_DTYPES, SCALE_STORAGES
from qcompile.formats.sparse import SparseFormat
from qcompile.formats.split import Part, Percent, SplitFormat
from qcompile.formats.vector import VectorFormat
from qcompile.kernels.lookup.levels import levels, spell_levels
from qcompile.kernels.lookup_vectors.codebooks import codebook_names

_EXAMPLES = "int4-g64, int8, int4-g32-asym, nf4-g64, fp8, mxfp4, ternary-g64, int4+1%fp16"
_TABLES = ("ternary", "nf4", *ALIASES)
_UNTURNED = "unturned"
_FAMILY = re.compile(r"(?P<family>\([^)]*\)|[^-]*)(?:-(?P<options>.*))?", re.DOTALL)
_INTEGER = re.compile(r"int([0-9]+)")
_GROUP = re.compile(r"g([0-9]+)")
_PART = re.compile(r"(?:(?P<percent>[0-9]*\.?[0-9]+)%|(?P<count>[0-9]+)x)(?P<format>.+)", re.DOTALL)


def parse_format(text: str) -> Format:
    """Reads the name of a format.

    - ``int<bits>``: integers of 1 to 8 bits; ``-asym``, ``-asym16`` or ``-sym`` (the
      default).
    - ``nf4``, ``fp4`` (e2m1), ``fp8`` (e4m3), ``e<exponent bits>m<mantissa bits>``, ``ternary``,
      ``(-1.5,-0.5,0.5,1.5)``: codes of a table of levels.
    - ``higgs<dimension>x<points>``: a code for every `dimension` weights, of a codebook of `points`
      vectors, in a turned basis; ``-unturned`` without; see `VectorFormat`.
    - ``mxfp4``, ``mxfp6``, ``mxfp8``, ``nvfp4``: tables with groups and scales as standards say.

    All but the last take ``-g<group size>`` (else one scale per row) and the type of the scales:
    ``-fp16``, ``-bf16``, ``-fp32``; integers also ``-intscale`` (8-bit whole numbers and one
    float32 per row); tables also ``-e8m0`` (powers of two), ``-e4m3`` (8-bit floats
    and one float32 per weight) and ``-dq`` (8-bit numbers and one float32 per row). What follows
    the first part may come in any order.

    Columns are divided among formats by ``<base>+<amount><format>``, where the amount is a share
    such as ``1%`` or a count of blocks of columns such as ``4x``; formats beside the base may also
    be ``fp16``, ``bf16`` and ``fp32``; see `SplitFormat`. A ``/<amount>fp16`` behind all that adds
    floats to a few numbers of each row; see `SparseFormat`.

    Args:
        text: Such as ``"int4-g64-asym-bf16"``; upper and lower case are the same.

    Returns:
        The format, whose `str` is the canonical name and reads back as an equal format.

    Raises:
        RecipeError: The name means nothing; the message says which part and suggests a remedy.
    """
    if "/" in text:
        return _sparse(text)
    if "+" in text:
        return _split(text)
    match = _FAMILY.fullmatch(text.strip().lower())
    assert match is not None  # it takes any text
    family = match["family"].replace(" ", "")
    options = match["options"].split("-") if match["options"] is not None else []
    if (integer := _INTEGER.fullmatch(family)) is not None:
        chosen = _Options(text, options, (*SCALE_DTYPES, INTEGER_SCALES), symmetry=True)
        dtype = SCALE_DTYPES.get(chosen.scale or "", torch.float16)
        zero_dtype = torch.float16 if chosen.float_zero_points else torch.uint8
        format = IntegerFormat(
            int(integer[1]), chosen.group_size, chosen.symmetric, dtype, zero_dtype
        )
        return IntegerScaleFormat(format) if chosen.scale == INTEGER_SCALES else format
    if family in STANDARD_FORMATS:
        if options:
            raise RecipeError(
                f"format '{text}': cannot use '{options[0]}'",
                remedy=f"write {family} alone: its groups and scales are part of the standard",
            )
        return STANDARD_FORMATS[family]
    if family in codebook_names():
        return _vectors(text, family, options)
    return _lookup(text, family, options)


def _split(text: str) -> SplitFormat:
    base, *others = text.strip().lower().split("+")
    return SplitFormat(parse_format(base), tuple(_part(text, other) for other in others))


def _part(text: str, part: str) -> Part:
    amount, name = _amount(text, part)
    dense = SCALE_DTYPES.get(name)
    return Part(parse_format(name) if dense is None else DenseFormat(dense), amount)


def _sparse(text: str) -> SparseFormat:
    base, side = text.strip().lower().split("/", 1)
    amount, name = _amount(text, side)
    if name != "fp16":
        raise _bad_part(text, side)
    return SparseFormat(parse_format(base), amount)


def _amount(text: str, part: str) -> tuple[int | Percent, str]:
    """How much of a weight is stored otherwise, and as what."""
    match = _PART.fullmatch(part.strip())
    if match is None:
        raise _bad_part(text, part)
    percent, count = match["percent"], match["count"]
    if float(percent or count) == 0 or (percent and float(percent) >= 100):
        raise _bad_part(text, part)
    amount = Percent(float(percent)) if percent else int(count)
    return amount, match["format"].strip()


def _bad_part(text: str, part: str) -> RecipeError:
    return RecipeError(
        f"format '{text}': cannot use '{part}'",
        remedy="write how much of the columns it has, such as 1%fp16 or 4xint8",
    )


def _lookup(text: str, family: str, options: list[str]) -> LookupFormat:
    table = ALIASES.get(family, family)
    try:
        levels(table)
    except ValueError as error:
        if family.startswith("("):
            raise RecipeError(f"format '{text}': {error}") from error
        raise _unknown(text) from error
    if family.startswith("("):
        table = spell_levels(levels(family))
    chosen = _Options(text, options, (*SCALE_STORAGES,), symmetry=False)
    scales = SCALE_STORAGES[chosen.scale] if chosen.scale else default_scales(table)
    return LookupFormat(table, chosen.group_size, scales)


def _vectors(text: str, family: str, options: list[str]) -> VectorFormat:
    turned = _UNTURNED not in options
    rest = [option for option in options if option != _UNTURNED]
    chosen = _Options(text, rest, (*SCALE_DTYPES,), symmetry=False)
    return VectorFormat(family, chosen.group_size, SCALE_DTYPES[chosen.scale or "fp16"], turned)


class _Options:
    """What follows the family in a format's name."""

    def __init__(
        self, text: str, options: list[str], scales: tuple[str, ...], *, symmetry: bool
    ) -> None:
        self.group_size = 0
        self.symmetric = True
        self.float_zero_points = False
        self.scale: str | None = None
        symmetries = ("sym", "asym", FLOAT_ZERO_POINTS) if symmetry else ()
        words = (*symmetries, *scales)
        given: set[str] = set()
        for option in options:
            group = _GROUP.fullmatch(option)
            if group is not None and int(group[1]) > 0:
                kind, self.group_size = "group", int(group[1])
            elif option in symmetries:
                kind, self.symmetric = "symmetry", option == "sym"
                self.float_zero_points = option == FLOAT_ZERO_POINTS
            elif option in scales:
                kind, self.scale = "scale", option
            else:
                raise _bad_option(text, option, words)
            if kind in given:
                raise _bad_option(text, option, words)
            given.add(kind)


def _bad_option(text: str, option: str, words: tuple[str, ...]) -> RecipeError:
    message = f"format '{text}': cannot use '{option}'"
    if _GROUP.fullmatch(option) and int(option[1:]) == 0:
        return RecipeError(message, remedy="leave the group out for one scale per row")
    if _GROUP.fullmatch(option) or option in words:
        return RecipeError(message, remedy="give the group size, the symmetry and the scales once")
    if option.isdigit():
        return RecipeError(message, remedy=f"a group size is written g{option}")
    close = difflib.get_close_matches(option, words, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return RecipeError(
        message, remedy=f"{hint}after the family come g<group size>, {', '.join(words)}"
    )


def _unknown(text: str) -> RecipeError:
    known = [*(f"int{bits}" for bits in range(1, 9)), *_TABLES, *STANDARD_FORMATS]
    known += codebook_names()
    family = re.split(r"[-_ ]", text.strip().lower())[0]
    close = difflib.get_close_matches(family, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return RecipeError(f"unknown format '{text}'", remedy=f"{hint}formats are named {_EXAMPLES}")
