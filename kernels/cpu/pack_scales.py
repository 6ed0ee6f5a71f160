"""Scales of the packed format: floats, or bytes of a table of their own."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

ScaleDtype = Literal["float32", "float16", "bfloat16", "e8m0", "e4m3", "uint8"]
SCALE_DTYPES: tuple[ScaleDtype, ...] = ("float32", "float16", "bfloat16", "e8m0", "e4m3", "uint8")
"""Names of the scale types; the index of one is the kernels' attribute `scale_dtype`."""

OUTER_SCALES: dict[ScaleDtype, Literal["weight", "row"]] = {"e4m3": "weight", "uint8": "row"}
"""Types that need a float32 beside them, and whether it belongs to the weight or to a row."""

_WIDTHS: dict[ScaleDtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


def scale_width(scale_dtype: ScaleDtype) -> int:
    """Bytes of a stored scale."""
    return _WIDTHS.get(scale_dtype, 1)


def is_coded(scale_dtype: ScaleDtype) -> bool:
    """Whether scales are codes of one byte."""
    return scale_dtype not in _WIDTHS


def encode_scales(
    scale: npt.NDArray[np.floating] | _Bytes, scale_dtype: ScaleDtype, name: str = "scale"
) -> _Bytes:
    """[N, G] scales, or their codes, to [N, G, bytes]; messages call them `name`.

    Raises:
        ValueError: Floats would be rounded, or codes are no bytes.
    """
    if is_coded(scale_dtype):
        if scale.dtype != np.uint8:
            raise ValueError(f"scales of type {scale_dtype} are uint8 codes, not {scale.dtype}")
        return np.ascontiguousarray(scale, np.uint8).reshape(*scale.shape, 1)
    single = np.ascontiguousarray(scale, dtype="<f4")
    if scale_dtype == "float32":
        stored = single.view(np.uint8).reshape(*scale.shape, 4)
    elif scale_dtype == "float16":
        with np.errstate(over="ignore"):  # an overflow is caught below
            half = single.astype("<f2")
        stored = half.view(np.uint8).reshape(*scale.shape, 2)
    else:
        words = single.view("<u4") >> np.uint32(16)
        stored = words.astype("<u2").view(np.uint8).reshape(*scale.shape, 2)
    back = decode_scales(stored.reshape(scale.shape[0], -1), scale_dtype)
    wrong = back != scale
    if wrong.any():
        row, group = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"{name}[{row}, {group}] = {scale[row, group]!r} is no {scale_dtype}: "
            f"round {name}s before codes are chosen"
        )
    return stored


def decode_scales(stored: _Bytes, scale_dtype: ScaleDtype) -> _Floats | _Bytes:
    """[N, G * bytes] to [N, G] float32, or to codes as they are."""
    contiguous = np.ascontiguousarray(stored)
    if is_coded(scale_dtype):
        return contiguous
    if scale_dtype == "float32":
        return contiguous.view("<f4").astype(np.float32)
    if scale_dtype == "float16":
        return contiguous.view("<f2").astype(np.float32)
    words: npt.NDArray[np.uint32] = contiguous.view("<u2").astype(np.uint32) << np.uint32(16)
    return words.view(np.float32)
