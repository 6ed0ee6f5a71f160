"""Which formats the kernels read, and how the attributes of a packed weight say so."""

from __future__ import annotations

from typing import get_args

from qcompile.formats import Format, IntegerFormat, IntegerScaleFormat, LookupFormat, VectorFormat
from qcompile.formats.scales import FloatScale
from qcompile.kernels.cpu.layout import SCALE_DTYPES, Coding, ScaleDtype, WeightLayout
from qcompile.kernels.cpu.weight_layout import ZeroDtype
from qcompile.kernels.lookup.levels import code_bits

_GROUP_UNIT = 16


def unpackable_reason(format: Format) -> str | None:
    """Why the kernels cannot read weights of a format, one clause; None if they can."""
    if not isinstance(format, IntegerFormat | IntegerScaleFormat | LookupFormat):
        return f"the cpu kernels have no {format}"
    if format.group_size % _GROUP_UNIT:
        return f"the cpu kernels read groups of a multiple of {_GROUP_UNIT}"
    return None


def unmultipliable_reason(format: Format) -> str | None:
    """The same for weights of linear layers only, which may be codes of vectors as well."""
    return None if isinstance(format, VectorFormat) else unpackable_reason(format)


def layout_of(format: Format) -> WeightLayout:
    """How weights of a format are packed, which must be one that `unpackable_reason` lets pass."""
    if isinstance(format, IntegerFormat):
        scale_dtype = _SCALE_NAMES[str(format.scale_dtype)]
        return WeightLayout(
            format.bits, format.group_size, _zero_dtype(format), scale_dtype, "integer"
        )
    if isinstance(format, IntegerScaleFormat):
        zeros = _zero_dtype(format.base)
        return WeightLayout(format.bits, format.group_size, zeros, "uint8", "integer")
    assert isinstance(format, LookupFormat)
    scales = format.scales
    name = str(scales.dtype) if isinstance(scales, FloatScale) else scales.name
    # Tables that are not the kernels' own are looked up in levels that the weight brings along.
    coding = _CODINGS.get(format.table, "table")
    return WeightLayout(
        code_bits(format.table), format.group_size, None, _SCALE_NAMES[name], coding
    )


def _zero_dtype(format: IntegerFormat) -> ZeroDtype | None:
    if format.symmetric:
        return None
    return "float16" if format.has_float_zero_points else "uint8"


_CODINGS: dict[str, Coding] = {
    name: name for name in get_args(Coding) if name not in ("integer", "table")
}
_SCALE_NAMES: dict[str, ScaleDtype] = {
    **{f"torch.{name}": name for name in SCALE_DTYPES},
    "e8m0": "e8m0",
    "e4m3": "e4m3",
    "dq": "uint8",
}
