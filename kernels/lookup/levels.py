"""The tables that codes are looked up in, by name: the value of each code.

| name | values |
|---|---|
| ``e2m1``, ``e4m3``, any ``e<E>m<M>`` | small floats of E exponent and M mantissa bits |
| ``ternary`` | -1, 0, 1 |
| ``nf4`` | 16 quantiles of the normal distribution |
| ``e8m0`` | powers of two, 2^-127 to 2^127 |
| ``uint8`` | whole numbers, 0 to 255 |
| ``(-1.5,-0.5,0.5,1.5)`` | any numbers, rounded to float32, in this order |
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite, nan
from statistics import NormalDist

MOST_LEVELS = 256
"""Codes are bytes."""

_FLOAT = re.compile(r"e([1-8])m([0-7])")


@dataclass(frozen=True)
class FloatFields:
    """What the codes of small floats consist of, behind a sign bit.

    The exponent's bias is ``2^(E-1) - 1``, at least 0, and there are subnormals.

    Attributes:
        exponent_bits: E.
        mantissa_bits: M.
    """

    exponent_bits: int
    mantissa_bits: int

    @property
    def least_exponent(self) -> int:
        """That of the smallest normal number, and of all subnormal ones."""
        return 2 - max(1 << self.exponent_bits - 1, 1)


def float_fields(table: str) -> FloatFields | None:
    """The fields of a table of small floats, or None if it is something else."""
    match = _FLOAT.fullmatch(table)
    if match is None or int(match[1]) + int(match[2]) > 7:
        return None
    return FloatFields(int(match[1]), int(match[2]))


@lru_cache(maxsize=256)
def levels(table: str) -> tuple[float, ...]:
    """The value of each code, numbers that float32 holds exactly.

    Codes that stand for no number (the NaN of ``e4m3`` and ``e8m0``) are NaN, or infinite in
    ``e5m2``; no encoder uses them.

    Args:
        table: A name or numbers; see the table above.

    Raises:
        ValueError: If it is neither, or the numbers are not finite in float32, not distinct, or
            more than `MOST_LEVELS`.
    """
    if table == "ternary":
        return (-1.0, 0.0, 1.0)
    if table == "nf4":
        return _normal_float()
    if table == "e8m0":
        return (*(2.0**exponent for exponent in range(-127, 128)), nan)
    if table == "uint8":
        return tuple(float(code) for code in range(256))
    fields = float_fields(table)
    if fields is not None:
        return _small_float(fields)
    if table.startswith("("):
        return _numbers(table)
    raise ValueError(f"'{table}' is no table of levels")


def spell_levels(values: Sequence[float]) -> str:
    """A table of any numbers as `levels` reads it.

    Args:
        values: Rounded to float32 first.
    """
    return f"({','.join(_shortest(_single(value)) for value in values)})"


def code_bits(table: str) -> int:
    """Bits that a code of a table takes by itself: the least whole number that can tell all."""
    return max(1, (len(levels(table)) - 1).bit_length())


def _small_float(fields: FloatFields) -> tuple[float, ...]:
    """All codes, sign bit first.

    As in the OCP specifications: e4m3 has a NaN for its last code and no infinities, e5m2 is like
    IEEE 754's types, and the smaller ones are all numbers.
    """
    positive = []
    for exponent in range(2**fields.exponent_bits):
        for mantissa in range(2**fields.mantissa_bits):
            implicit = 1 if exponent else 0
            fraction = implicit + mantissa / 2**fields.mantissa_bits
            positive.append(fraction * 2.0 ** (max(exponent, 1) - 1 + fields.least_exponent))
    if fields == FloatFields(4, 3):
        positive[-1] = nan
    if fields == FloatFields(5, 2):
        positive[-4:] = [inf, nan, nan, nan]
    return (*positive, *(-value for value in positive))


def _normal_float() -> tuple[float, ...]:
    """NF4: quantiles of the normal distribution that are even on each side of an exact zero.

    QLoRA (Dettmers et al., 2023), section 3 and its code: 9 quantiles from the middle to the last
    one on the positive side and 8 on the negative one share the zero; the last one leaves out the
    mean of half a sixteenth and half a fifteenth of the probability. Scaled to [-1, 1].
    """
    last = 1 - (1 / 32 + 1 / 30) / 2
    quantile = NormalDist().inv_cdf

    def side(steps: int) -> list[float]:
        return [quantile(0.5 + (last - 0.5) * step / steps) for step in range(1, steps + 1)]

    negative, positive = side(7), side(8)
    largest = positive[-1]
    values = [*(-value for value in reversed(negative)), 0.0, *positive]
    return tuple(_single(value / largest) for value in values)


def _numbers(table: str) -> tuple[float, ...]:
    try:
        values = tuple(_single(float(n)) for n in table[1:].removesuffix(")").split(","))
    except ValueError as error:
        raise ValueError(f"'{table}' is no list of numbers") from error
    except OverflowError as error:
        raise ValueError("levels are finite numbers of float32") from error
    if not 2 <= len(values) <= MOST_LEVELS or len(set(values)) < len(values):
        raise ValueError(f"a table has 2 to {MOST_LEVELS} different levels")
    if not all(map(isfinite, values)):
        raise ValueError("levels are finite numbers of float32")
    return values


def _single(value: float) -> float:
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def _shortest(value: float) -> str:
    """The fewest digits that read back as the same float32."""
    digits = next(
        digits for digits in range(1, 10) if _single(float(f"{value:.{digits}g}")) == value
    )
    return f"{value:.{digits}g}"
