"""How a packed weight is stored, as one value: what `qcompile.kernels.cpu.layout` packs by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qcompile.kernels.cpu.pack_scales import SCALE_DTYPES, ScaleDtype

Coding = Literal["integer", "table", "e2m1", "e4m3", "ternary"]
CODINGS: dict[Coding, tuple[int, ...]] = {
    "integer": (1, 2, 3, 4, 5, 6, 7, 8),
    "table": (1, 2, 3, 4, 5, 6, 7, 8),
    "e2m1": (4,),
    "e4m3": (8,),
    "ternary": (2,),
}
"""What codes can stand for, and how many bits they may then have."""

ZeroDtype = Literal["uint8", "float16"]
_ZERO_POINTS: dict[ZeroDtype | None, str] = {None: "", "uint8": "-zeros", "float16": "-zeros16"}
"""How the text of a layout ends."""


@dataclass(frozen=True)
class WeightLayout:
    """The attributes of a packed weight but for its shape.

    ``str(layout)`` is what operators of a lowered program are called with, such as
    ``"integer-4-g32-float16-zeros"``; `parse` is its inverse.

    Attributes:
        bits: Of the codes, 1 to 8.
        group_size: Weights per scale along K, a multiple of 16; 0 is one group per row.
        zero_dtype: How zero points are stored, of integers only: as codes, or as floats; None where
            there are none.
        scale_dtype: How scales are stored.
        coding: What codes stand for.

    Raises:
        ValueError: the kernels know no such layout.
    """

    bits: int
    group_size: int
    zero_dtype: ZeroDtype | None = None
    scale_dtype: ScaleDtype = "float16"
    coding: Coding = "integer"

    def __post_init__(self) -> None:
        if self.coding not in CODINGS:
            raise ValueError(f"coding = {self.coding!r} is none of {tuple(CODINGS)}")
        if self.bits not in CODINGS[self.coding]:
            raise ValueError(f"bits = {self.bits} cannot be packed; only {CODINGS[self.coding]}")
        if self.group_size < 0 or self.group_size % 16 != 0:
            raise ValueError(f"group_size = {self.group_size} is neither 0 nor a multiple of 16")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype = {self.scale_dtype!r} is none of {SCALE_DTYPES}")
        if self.zero_dtype not in _ZERO_POINTS:
            raise ValueError(f"zero_dtype = {self.zero_dtype!r} is none of {tuple(_ZERO_POINTS)}")
        if self.zero_dtype is not None and self.coding != "integer":
            raise ValueError(f"codes of the coding {self.coding!r} have no zero points")

    def __str__(self) -> str:
        parts = [self.coding, str(self.bits), f"g{self.group_size}", self.scale_dtype]
        return "-".join(parts) + _ZERO_POINTS[self.zero_dtype]

    @staticmethod
    def parse(text: str) -> WeightLayout:
        """The layout whose text this is.

        Raises:
            ValueError: it is none.
        """
        codings = {str(name): name for name in CODINGS}
        scales = {str(name): name for name in SCALE_DTYPES}
        zeros = {end: dtype for dtype, end in _ZERO_POINTS.items()}
        found = re.fullmatch(r"(\w+)-(\d)-g(\d+)-([a-z0-9]+)(|-\w+)", text)
        if found is None:
            raise ValueError(f"{text!r} describes no packed weight")
        coding, bits, group_size, scale, end = found.groups()
        if coding not in codings or scale not in scales or end not in zeros:
            raise ValueError(f"{text!r} describes no packed weight")
        return WeightLayout(int(bits), int(group_size), zeros[end], scales[scale], codings[coding])

    @property
    def multiplies_bytes(self) -> bool:
        """Whether the kernels multiply int8 activations with the codes."""
        return self.coding not in ("table", "e4m3")

    def attributes(self) -> dict[str, int | str]:
        """As the operators of the library take them."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "has_zero_point": int(self.zero_dtype is not None),
            "float_zero_point": int(self.zero_dtype == "float16"),
            "scale_dtype": SCALE_DTYPES.index(self.scale_dtype),
            "coding": self.coding,
        }
