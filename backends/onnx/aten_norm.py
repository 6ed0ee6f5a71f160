"""Normalization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError, static_size, to_ir_dtype

aten = torch.ops.aten

NORM = Table()


def rms_normalize(
    b: Builder, x: ir.Value, weight: ir.Value | None, eps: float, axes: Sequence[int] = (-1,)
) -> ir.Value:
    """``x / sqrt(mean(x^2) + eps) * weight``."""
    mean_square = b.op("ReduceMean", b.op("Mul", x, x), list(axes))
    root = b.op("Sqrt", b.op("Add", mean_square, eps))
    normal = b.op("Div", x, root)
    return normal if weight is None else b.op("Mul", normal, weight)


@NORM.register(aten.rms_norm.default)
def _rms_norm(
    b: Builder,
    x: ir.Value,
    normalized_shape: Sequence[int],
    weight: ir.Value | None = None,
    eps: float | None = None,
) -> ir.Value:
    floor = torch.finfo(b.result.dtype).eps if eps is None else eps
    return rms_normalize(b, x, weight, floor, range(-len(normalized_shape), 0))


def layer_normalize(
    b: Builder,
    x: ir.Value,
    shape: Sequence[int],
    weight: ir.Value | None,
    bias: ir.Value | None,
    eps: float,
) -> ir.Value:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last axes, of a shape."""
    dtype = x.dtype or ir.DataType.FLOAT
    gain = b.constant(np.ones(tuple(shape)), dtype) if weight is None else weight
    return b.op("LayerNormalization", x, gain, bias, axis=-len(shape), epsilon=float(eps))


@NORM.register(aten.layer_norm.default)
def _layer_norm(
    b: Builder,
    x: ir.Value,
    normalized_shape: Sequence[int],
    weight: ir.Value | None = None,
    bias: ir.Value | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> ir.Value:
    del cudnn_enable
    return layer_normalize(b, x, normalized_shape, weight, bias, eps)


@NORM.register(aten.native_layer_norm.default)
def _native_layer_norm(
    b: Builder,
    x: ir.Value,
    normalized_shape: Sequence[int],
    weight: ir.Value | None,
    bias: ir.Value | None,
    eps: float,
) -> list[ir.Value]:
    _only_first_is_used(b)
    return [layer_normalize(b, x, normalized_shape, weight, bias, eps)]


def _only_first_is_used(b: Builder) -> None:
    if any(user.args[1] != 0 for user in b.node.users):
        raise UnsupportedError("the statistics of a normalization")


@NORM.register(aten.batch_norm.default, aten.cudnn_batch_norm.default)
def _batch_norm(
    b: Builder,
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    mean: ir.Value | None,
    variance: ir.Value | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> ir.Value:
    del momentum, cudnn_enabled
    if training or mean is None or variance is None:
        raise UnsupportedError("batch normalization by the statistics of the batch")
    channels = b.shape(mean)
    gain, shift = _affine(b, weight, bias, int(channels[0]))
    return b.op("BatchNormalization", x, gain, shift, mean, variance, epsilon=float(eps))


@NORM.register(aten._native_batch_norm_legit_no_training.default)
def _batch_norm_tuple(
    b: Builder,
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    mean: ir.Value,
    variance: ir.Value,
    momentum: float,
    eps: float,
) -> list[ir.Value]:
    _only_first_is_used(b)
    return [_batch_norm(b, x, weight, bias, mean, variance, False, momentum, eps)]


@NORM.register(aten.instance_norm.default)
def _instance_norm(
    b: Builder,
    x: ir.Value,
    weight: ir.Value | None,
    bias: ir.Value | None,
    mean: ir.Value | None,
    variance: ir.Value | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> ir.Value:
    if not use_input_stats:
        return _batch_norm(b, x, weight, bias, mean, variance, False, momentum, eps, cudnn_enabled)
    channels = static_size(b.shape(x)[1])
    if channels is None:
        raise UnsupportedError("instance normalization of a number of channels that varies")
    gain, shift = _affine(b, weight, bias, channels)
    return b.op("InstanceNormalization", x, gain, shift, epsilon=float(eps))


def _affine(
    b: Builder, weight: ir.Value | None, bias: ir.Value | None, channels: int
) -> tuple[ir.Value, ir.Value]:
    dtype = _result_dtype(b)
    gain = b.constant(np.ones(channels), dtype) if weight is None else weight
    shift = b.constant(np.zeros(channels), dtype) if bias is None else bias
    return gain, shift


def _result_dtype(b: Builder) -> ir.DataType:
    value: Any = b.node.meta["val"]
    return to_ir_dtype((value[0] if isinstance(value, (tuple, list)) else value).dtype)


@NORM.register(aten.group_norm.default)
def _group_norm(
    b: Builder,
    x: ir.Value,
    num_groups: int,
    weight: ir.Value | None = None,
    bias: ir.Value | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> ir.Value:
    del cudnn_enabled
    dtype = b.dtype
    grouped = b.op("Reshape", x, [0, num_groups, -1])
    ones, zeros = (b.constant(np.full(num_groups, value), dtype) for value in (1.0, 0.0))
    normal = b.op("InstanceNormalization", grouped, ones, zeros, epsilon=float(eps))
    made = b.op("Reshape", normal, b.op("Shape", x))
    channel = [-1, *[1] * (b.rank(x) - 2)]
    if weight is not None:
        made = b.op("Mul", made, b.reshape(weight, channel))
    return made if bias is None else b.op("Add", made, b.reshape(bias, channel))
