"""Activation functions."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from qcompile.backends.onnx.builder import Builder
from qcompile.backends.onnx.calls import Attribute
from qcompile.backends.onnx.translation import Table
from qcompile.backends.onnx.values import UnsupportedError

aten = torch.ops.aten

ACTIVATION = Table()


def _direct(op_type: str, **attributes: Attribute) -> Callable[..., ir.Value]:
    return lambda b, x: b.op(op_type, b.tensor(x, b.dtype), **attributes)


ACTIVATION.update(
    {
        aten.sigmoid.default: _direct("Sigmoid"),
        aten.tanh.default: _direct("Tanh"),
        aten.relu.default: _direct("Relu"),
        aten.selu.default: _direct("Selu"),
        aten.hardswish.default: _direct("HardSwish"),
        aten.hardsigmoid.default: _direct("HardSigmoid", alpha=1 / 6, beta=0.5),
    }
)


@ACTIVATION.register(aten.silu.default)
def silu(b: Builder, x: ir.Value) -> ir.Value:
    """``x * sigmoid(x)``."""
    return b.op("Mul", x, b.op("Sigmoid", x))


@ACTIVATION.register(aten.gelu.default)
def gelu(b: Builder, x: ir.Value, approximate: str = "none") -> ir.Value:
    """``x * Phi(x)``, or its approximation by tanh."""
    return b.op("Gelu", x, approximate=approximate)


@ACTIVATION.register(aten.relu6.default)
def _relu6(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Clip", x, 0.0, 6.0)


@ACTIVATION.register(aten.leaky_relu.default)
def _leaky_relu(b: Builder, x: ir.Value, negative_slope: float = 0.01) -> ir.Value:
    return b.op("LeakyRelu", x, alpha=float(negative_slope))


@ACTIVATION.register(aten.prelu.default, aten._prelu_kernel.default)
def _prelu(b: Builder, x: ir.Value, weight: ir.Value) -> ir.Value:
    if b.rank(weight) == 1 and b.rank(x) > 2:  # one slope per channel, the second axis
        weight = b.reshape(weight, [-1 if i == 1 else 1 for i in range(b.rank(x))])
    return b.op("PRelu", x, weight)


@ACTIVATION.register(aten.elu.default)
def _elu(
    b: Builder, x: ir.Value, alpha: float = 1, scale: float = 1, input_scale: float = 1
) -> ir.Value:
    if input_scale != 1:
        raise UnsupportedError("elu with an input scale")
    made = b.op("Elu", x, alpha=float(alpha))
    return made if scale == 1 else b.op("Mul", made, scale)


@ACTIVATION.register(aten.celu.default)
def _celu(b: Builder, x: ir.Value, alpha: float = 1.0) -> ir.Value:
    return b.op("Celu", x, alpha=float(alpha))


@ACTIVATION.register(aten.softplus.default)
def softplus(b: Builder, x: ir.Value, beta: float = 1, threshold: float = 20) -> ir.Value:
    """``log(1 + exp(beta x)) / beta``, or ``x`` where ``beta x`` passes the threshold."""
    scaled = x if beta == 1 else b.op("Mul", x, beta)
    made = b.op("Softplus", scaled)
    if beta != 1:
        made = b.op("Div", made, beta)
    # Past 17 both are equal to float32 rounding, so the usual threshold of 20 changes nothing.
    return made if threshold >= 17 else b.op("Where", b.op("Greater", scaled, threshold), x, made)


@ACTIVATION.register(aten.mish.default)
def _mish(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Mul", x, b.op("Tanh", b.op("Softplus", x)))


@ACTIVATION.register(aten.log_sigmoid.default)
def _log_sigmoid(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("Neg", b.op("Softplus", b.op("Neg", x)))


@ACTIVATION.register(aten.glu.default)
def _glu(b: Builder, x: ir.Value, dim: int = -1) -> ir.Value:
    value, gate = b.ops("Split", x, outputs=2, axis=dim, num_outputs=2)
    return b.op("Mul", value, b.op("Sigmoid", gate))


@ACTIVATION.register(aten.threshold.default)
def _threshold(b: Builder, x: ir.Value, threshold: float, value: float) -> ir.Value:
    return b.op("Where", b.op("Greater", x, threshold), x, b.constant(value, b.dtype))


@ACTIVATION.register(aten.hardshrink.default)
def _hardshrink(b: Builder, x: ir.Value, lambd: float = 0.5) -> ir.Value:
    return b.op("Shrink", x, lambd=float(lambd), bias=0.0)


@ACTIVATION.register(aten.softshrink.default)
def _softshrink(b: Builder, x: ir.Value, lambd: float = 0.5) -> ir.Value:
    return b.op("Shrink", x, lambd=float(lambd), bias=float(lambd))
