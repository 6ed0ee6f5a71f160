"""How the kernels round activations to whole numbers: what the attribute `act` of a node says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from qcompile.kernels.dequantize.reference import dequantize
from qcompile.kernels.quantize.reference import dynamic_scale, quantize

FLOAT: Final = "float"
"""`act` of activations that are not rounded."""

WIDTHS: Final = range(2, 9)
"""Bits of the codes. All of them are multiplied as bytes: fewer cost no less time."""

Scales = Literal["token", "group", "static"]


@dataclass(frozen=True)
class IntegerActivations:
    """Activations that a kernel rounds before it multiplies them.

    Attributes:
        bits: Width of the codes, one of `WIDTHS`.
        scales: Measured on each token, or on each of its groups along K, which are those of the
            weight; or stored, one for all.
        signed: Whether codes have a sign; if not, they have a stored zero point.
    """

    bits: int
    scales: Scales
    signed: bool = True

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}_{self.scales}"

    @classmethod
    def parse(cls, act: str) -> IntegerActivations | None:
        """The inverse of ``str``; None for `FLOAT`.

        Raises:
            ValueError: It is neither.
        """
        if act == FLOAT:
            return None
        if act not in _BY_TEXT:
            raise ValueError(f"act = {act!r} is neither {FLOAT!r} nor one of {', '.join(_BY_TEXT)}")
        return _BY_TEXT[act]

    @property
    def middle(self) -> int:
        """What codes without a sign are moved down by, so that they are signed bytes."""
        return int(2 ** (self.bits - 1))

    def round(self, x: Tensor, group_size: int, grid: Tensor | None = None) -> Tensor:
        """Activations ``[..., K]`` as their codes decode.

        Args:
            x: ``[..., K]``.
            group_size: Of the weight.
            grid: Scale and zero point of static codes, ``[2]``.
        """
        group = group_size if self.scales == "group" else 0
        zero_point = None
        if grid is None:
            scale = dynamic_scale(x, self.bits, group)
        else:
            scale, zero = grid[:1], grid[1:]
            zero_point = None if self.signed else zero.to(torch.uint8)
        codes = quantize(x, scale, zero_point, self.bits, group)
        return dequantize(codes, scale, zero_point, self.bits, group)


_BY_TEXT: Final = {
    str(one): one
    for bits in WIDTHS
    for one in (
        IntegerActivations(bits, "token"),
        IntegerActivations(bits, "group"),
        IntegerActivations(bits, "static"),
        IntegerActivations(bits, "static", signed=False),
    )
}
