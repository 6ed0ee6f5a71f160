"""Which formats the kernels read."""

from __future__ import annotations

import torch

from qcompile.formats import Format, IntegerFormat
from qcompile.kernels.cpu.layout import PACKABLE_BITS, SCALE_DTYPES


def unpackable_reason(format: Format) -> str | None:
    """Why the kernels cannot read weights of a format, one clause; None if they can."""
    if not isinstance(format, IntegerFormat):
        return f"the cpu kernels have no {format}"
    if format.bits not in PACKABLE_BITS:
        widths = " and ".join(str(width) for width in PACKABLE_BITS)
        return f"the cpu kernels read codes of {widths} bits"
    if _name(format.scale_dtype) not in SCALE_DTYPES:
        return f"the cpu kernels read scales of {', '.join(SCALE_DTYPES)}"
    if format.group_size % _GROUP_UNIT:
        return f"the cpu kernels read groups of a multiple of {_GROUP_UNIT}"
    return None


def scale_dtype_index(dtype: torch.dtype) -> int:
    """The kernels' attribute `scale_dtype` for scales of a dtype."""
    names: tuple[str, ...] = SCALE_DTYPES
    return names.index(_name(dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_GROUP_UNIT = 16
