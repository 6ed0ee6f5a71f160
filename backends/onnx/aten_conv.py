"""Convolution, pooling, resizing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import Size, UnsupportedError

aten = torch.ops.aten

CONV = Table()

_INT64 = ir.DataType.INT64

Extent = int | Sequence[int]
"""One number for all spatial axes, or one for each."""


def _spread(value: Extent, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _spatial(b: Builder, x: ir.Value, rank: int) -> tuple[ir.Value, bool]:
    """A tensor with its batch axis, and whether that had to be added."""
    if b.rank(x) == rank + 2:
        return x, False
    return b.op("Unsqueeze", x, [0]), True


def _unbatched(b: Builder, x: ir.Value, added: bool) -> ir.Value:
    return b.op("Squeeze", x, [0]) if added else x


def _schema(b: Builder) -> torch.FunctionSchema:
    target = b.node.target
    assert isinstance(target, torch._ops.OpOverload)
    return target._schema


def _pool_rank(b: Builder) -> int:
    """Number of spatial axes, from a name such as ``aten::max_pool2d``."""
    return int(_schema(b).name.split("pool")[1][0])


def _conv(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None = None,
    stride: Extent = 1,
    padding: Extent | str = 0,
    dilation: Extent = 1,
    groups: int = 1,
) -> ir.Value:
    rank = b.rank(weight) - 2
    batch, added = _spatial(b, x, rank)
    dilations = _spread(dilation, rank)
    kernel = [int(size) for size in b.shape(weight)[2:]]
    made = b.op(
        "Conv",
        batch,
        weight,
        bias,
        strides=_spread(stride, rank),
        pads=_conv_pads(padding, kernel, dilations),
        dilations=dilations,
        group=groups,
        kernel_shape=kernel,
    )
    return _unbatched(b, made, added)


def _conv_pads(padding: Extent | str, kernel: list[int], dilations: list[int]) -> list[int]:
    if padding == "valid":
        return [0] * (2 * len(kernel))
    if padding == "same":  # torch pads more at the end where the total is odd
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        return [*(total // 2 for total in totals), *(total - total // 2 for total in totals)]
    assert not isinstance(padding, str)
    return _spread(padding, len(kernel)) * 2


CONV.update(
    dict.fromkeys(
        (
            aten.conv1d.default,
            aten.conv2d.default,
            aten.conv3d.default,
            aten.conv1d.padding,
            aten.conv2d.padding,
            aten.conv3d.padding,
        ),
        _conv,
    )
)


@CONV.register(
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input
)
def _conv_transpose(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None = None,
    stride: Extent = 1,
    padding: Extent = 0,
    output_padding: Extent = 0,
    groups: int = 1,
    dilation: Extent = 1,
) -> ir.Value:
    rank = b.rank(weight) - 2
    batch, added = _spatial(b, x, rank)
    made = b.op(
        "ConvTranspose",
        batch,
        weight,
        bias,
        strides=_spread(stride, rank),
        pads=_spread(padding, rank) * 2,
        output_padding=_spread(output_padding, rank),
        dilations=_spread(dilation, rank),
        group=groups,
    )
    return _unbatched(b, made, added)


@CONV.register(aten.convolution.default)
def _convolution(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None,
    stride: Extent,
    padding: Extent,
    dilation: Extent,
    transposed: bool,
    output_padding: Extent,
    groups: int,
) -> ir.Value:
    if not transposed:
        return _conv(b, x, weight, bias, stride, padding, dilation, groups)
    return _conv_transpose(b, x, weight, bias, stride, padding, output_padding, groups, dilation)


def _max_pool(
    b: Builder,
    x: ir.Value,
    kernel_size: Extent,
    stride: Extent = (),
    padding: Extent = 0,
    dilation: Extent = 1,
    ceil_mode: bool = False,
) -> Any:
    name = _schema(b).name
    rank = _pool_rank(b)
    batch, added = _spatial(b, x, rank)
    kernel = _spread(kernel_size, rank)
    made = b.op(
        "MaxPool",
        batch,
        kernel_shape=kernel,
        strides=_spread(stride, rank) or kernel,
        pads=_spread(padding, rank) * 2,
        dilations=_spread(dilation, rank),
        ceil_mode=int(ceil_mode),
    )
    pooled = _unbatched(b, made, added)
    if not name.endswith("with_indices"):
        return pooled
    if any(user.args[1] == 1 for user in b.node.users):
        raise UnsupportedError("the indices of a max pool")
    return [pooled]


CONV.update(
    dict.fromkeys(
        (
            aten.max_pool1d.default,
            aten.max_pool2d.default,
            aten.max_pool3d.default,
            aten.max_pool2d_with_indices.default,
        ),
        _max_pool,
    )
)


@CONV.register(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _average_pool(
    b: Builder,
    x: ir.Value,
    kernel_size: Extent,
    stride: Extent = (),
    padding: Extent = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> ir.Value:
    rank = _pool_rank(b)
    if divisor_override is not None:
        raise UnsupportedError("avg_pool with divisor_override")
    batch, added = _spatial(b, x, rank)
    kernel = _spread(kernel_size, rank)
    made = b.op(
        "AveragePool",
        batch,
        kernel_shape=kernel,
        strides=_spread(stride, rank) or kernel,
        pads=_spread(padding, rank) * 2,
        ceil_mode=int(ceil_mode),
        count_include_pad=int(count_include_pad),
    )
    return _unbatched(b, made, added)


@CONV.register(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
def _adaptive_average_pool(b: Builder, x: ir.Value, output_size: Extent) -> ir.Value:
    return _adaptive_pool(b, x, output_size, "ReduceMean", _average_along)


@CONV.register(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default)
def _adaptive_max_pool(b: Builder, x: ir.Value, output_size: Extent) -> list[ir.Value]:
    if any(user.args[1] == 1 for user in b.node.users):
        raise UnsupportedError("the indices of a max pool")
    return [_adaptive_pool(b, x, output_size, "ReduceMax", _maximum_along)]


def _adaptive_pool(
    b: Builder,
    x: ir.Value,
    output_size: Extent,
    whole: str,
    along: Callable[[Builder, ir.Value, ir.Value], ir.Value],
) -> ir.Value:
    """Pools each spatial axis on its own: windows are products of intervals."""
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    rank = b.rank(x)
    made = x
    for i, wanted in enumerate(sizes):
        axis = rank - len(sizes) + i
        length = b.axis_size(x, axis)
        if wanted == length:
            continue
        if wanted == 1:
            made = b.op(whole, made, [axis])
            continue
        order = [*(k for k in range(rank) if k != axis), axis]
        moved = b.op("Transpose", made, perm=order)
        pooled = along(b, moved, _windows(b, length, wanted))
        made = b.op("Transpose", pooled, perm=[order.index(k) for k in range(rank)])
    return made


def _windows(b: Builder, length: Size, wanted: int) -> ir.Value:
    """Which of ``length`` elements each of ``wanted`` windows has, boolean ``[length, wanted]``.

    Window ``j`` goes from ``floor(j length / wanted)`` to ``ceil((j + 1) length / wanted)``.
    """
    size = b.tensor(length, _INT64)
    number = b.constant(list(range(wanted)), _INT64)
    start = b.op("Div", b.op("Mul", number, size), wanted)
    last = b.op("Add", b.op("Mul", b.op("Add", number, 1), size), wanted - 1)
    end = b.op("Div", last, wanted)
    every = b.op("Range", b.constant(0, _INT64), size, b.constant(1, _INT64))
    place = b.op("Unsqueeze", every, [1])
    return b.op("And", b.op("GreaterOrEqual", place, start), b.op("Less", place, end))


def _average_along(b: Builder, x: ir.Value, windows: ir.Value) -> ir.Value:
    """Means over the windows of the last axis."""
    members = b.cast(windows, b.dtype)
    count = b.op("ReduceSum", members, [0], keepdims=0)
    return b.op("Div", b.op("MatMul", x, members), count)


def _maximum_along(b: Builder, x: ir.Value, windows: ir.Value) -> ir.Value:
    """Largest elements of the windows of the last axis."""
    outside = b.constant(float("-inf"), x.dtype or ir.DataType.FLOAT)
    seen = b.op("Where", windows, b.op("Unsqueeze", x, [-1]), outside)
    return b.op("ReduceMax", seen, [-2], keepdims=0)


def _resize(mode: str, **attributes: str) -> Callable[..., ir.Value]:
    def translate(b: Builder, x: ir.Value, size: Any, *rest: Any, **named: Any) -> ir.Value:
        arguments = _resize_arguments(b, size, rest, named)
        how: dict[str, Any] = dict(attributes)
        if arguments.get("align_corners"):
            how["coordinate_transformation_mode"] = "align_corners"
        scales = arguments.get("scale_factors")
        if scales:  # torch maps positions by the factor, not by the ratio of sizes
            factors = np.array([1.0, 1.0, *scales], np.float32)
            return b.op("Resize", x, None, factors, mode=mode, **how)
        sizes: list[Size] = b.sizes(b.result.shape)
        return b.op("Resize", x, None, None, sizes, mode=mode, **how)

    return translate


def _resize_arguments(
    b: Builder, size: Any, rest: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Arguments by name; some overloads give one scale for each axis, which becomes a list."""
    given = {
        argument.name: value
        for argument, value in zip(_schema(b).arguments[1:], (size, *rest), strict=False)
    } | named
    scales = [value for key, value in given.items() if key.startswith("scales") and value]
    if scales:
        given["scale_factors"] = scales
    return given


for _kinds, _translation in (
    (
        ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        _resize("nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    ),
    (
        ("_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
        _resize(
            "nearest",
            coordinate_transformation_mode="half_pixel",
            nearest_mode="round_prefer_ceil",
        ),
    ),
    (
        ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
        _resize("linear", coordinate_transformation_mode="half_pixel"),
    ),
    (
        ("upsample_bicubic2d",),
        _resize("cubic", coordinate_transformation_mode="half_pixel"),
    ),
):
    for _kind in _kinds:
        _packet = getattr(aten, _kind)
        CONV.update({_packet.vec: _translation, _packet.default: _translation})
