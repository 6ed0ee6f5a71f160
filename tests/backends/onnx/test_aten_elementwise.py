"""Every element-by-element operator gives in ONNX Runtime what it gives in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = Callable[[int], tuple[Tensor, ...]]


def floats(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3) * 2,)


def positive(n: int) -> tuple[Tensor, ...]:
    return (torch.rand(n, 3) * 3 + 0.1,)


def within_one(n: int) -> tuple[Tensor, ...]:
    return (torch.rand(n, 3) * 1.8 - 0.9,)


def small(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3) * 1e-4,)


def pair(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3), torch.randn(1, 3) + 0.1


def positive_pair(n: int) -> tuple[Tensor, ...]:
    return torch.rand(n, 3) + 0.1, torch.rand(3) * 2


def integers(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(-9, 9, (n, 3)),)


def integer_pair(n: int) -> tuple[Tensor, ...]:
    return torch.randint(-9, 9, (n, 3)), torch.tensor([[-3, 2, 5]])


def mixed_pair(n: int) -> tuple[Tensor, ...]:
    return torch.randint(-9, 9, (n, 3)), torch.randn(n, 3)


def flags(n: int) -> tuple[Tensor, ...]:
    return torch.rand(n, 3) > 0.5, torch.rand(n, 3) > 0.5


def specials(n: int) -> tuple[Tensor, ...]:
    x = torch.randn(n, 3)
    x[0] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    return (x,)


def condition(n: int) -> tuple[Tensor, ...]:
    return torch.rand(n, 3) > 0.5, torch.randn(n, 3), torch.randn(3)


def bytes_(n: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 255, (n, 3), dtype=torch.uint8),)


CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "abs": (torch.abs, floats),
    "abs_int": (torch.abs, integers),
    "neg": (torch.neg, floats),
    "sign": (torch.sign, floats),
    "floor": (torch.floor, floats),
    "ceil": (torch.ceil, floats),
    "round_half_to_even": (lambda x: torch.round(torch.round(x * 2) / 2), floats),
    "round_decimals": (lambda x: torch.round(x, decimals=1), floats),
    "trunc": (torch.trunc, floats),
    "frac": (torch.frac, floats),
    "exp": (torch.exp, floats),
    "exp2": (torch.exp2, floats),
    "expm1_near_zero": (lambda x: torch.expm1(x) * 1e4, small),
    "log": (torch.log, positive),
    "log2": (torch.log2, positive),
    "log10": (torch.log10, positive),
    "log1p": (torch.log1p, positive),
    "log1p_near_zero": (lambda x: torch.log1p(x) * 1e4, small),
    "sqrt": (torch.sqrt, positive),
    "sqrt_of_int": (lambda x: torch.sqrt(x.abs()), integers),
    "rsqrt": (torch.rsqrt, positive),
    "reciprocal": (torch.reciprocal, positive),
    "square": (torch.square, floats),
    "sin": (torch.sin, floats),
    "cos": (torch.cos, floats),
    "tan": (torch.tan, within_one),
    "asin": (torch.asin, within_one),
    "acos": (torch.acos, within_one),
    "atan": (torch.atan, floats),
    "sinh": (torch.sinh, floats),
    "cosh": (torch.cosh, floats),
    "tanh": (torch.tanh, floats),
    "asinh": (torch.asinh, floats),
    "atanh": (torch.atanh, within_one),
    "erf": (torch.erf, floats),
    "erfc": (torch.erfc, within_one),
    "add": (torch.add, pair),
    "add_alpha": (lambda x, y: torch.add(x, y, alpha=0.5), pair),
    "add_scalar": (lambda x: x + 1.5, floats),
    "add_int_and_float": (torch.add, mixed_pair),
    "add_float_scalar_to_int": (lambda x: x + 0.5, integers),
    "add_size": (lambda x: x + x.shape[0], floats),
    "sub_alpha": (lambda x, y: torch.sub(x, y, alpha=3), pair),
    "rsub": (lambda x: 1.0 - x, floats),
    "mul": (torch.mul, pair),
    "mul_bool": (lambda x, y: x * y, flags),
    "mul_bool_float": (lambda c, x, y: c * x * y, condition),
    "mul_size": (lambda x: x * (x.shape[0] * 2 + 1), floats),
    "div": (torch.div, pair),
    "div_ints": (lambda x: x / 2, integers),
    "div_floor": (lambda x, y: torch.div(x, y, rounding_mode="floor"), pair),
    "div_trunc": (lambda x, y: torch.div(x, y, rounding_mode="trunc"), pair),
    "div_floor_int": (lambda x, y: x // y, integer_pair),
    "div_trunc_int": (lambda x, y: torch.div(x, y, rounding_mode="trunc"), integer_pair),
    "div_by_root_of_size": (lambda x: x / x.shape[0] ** 0.5, floats),
    "remainder": (torch.remainder, pair),
    "remainder_int": (torch.remainder, integer_pair),
    "fmod": (torch.fmod, pair),
    "pow_2": (lambda x: x**2, floats),
    "pow_3": (lambda x: x**3, floats),
    "pow_half": (lambda x: x**0.5, positive),
    "pow_minus_half": (lambda x: x**-0.5, positive),
    "pow_minus_1": (lambda x: x**-1.0, positive),
    "pow_scalar": (lambda x: x**1.7, positive),
    "pow_of_scalar": (lambda x: 10000.0**x, within_one),
    "pow_tensor": (torch.pow, positive_pair),
    "pow_int": (lambda x: x**2, integers),
    "maximum": (torch.maximum, pair),
    "minimum": (torch.minimum, pair),
    "lerp": (lambda c, x, y: torch.lerp(x, y, 0.3), condition),
    "addcmul": (lambda c, x, y: torch.addcmul(x, x, y, value=2), condition),
    "clamp": (lambda x: x.clamp(-0.5, 0.7), floats),
    "clamp_min": (lambda x: x.clamp(min=0), floats),
    "clamp_max": (lambda x: x.clamp(max=1.0), floats),
    "clamp_int": (lambda x: x.clamp(-2, 4), integers),
    "clamp_tensor": (lambda x, y: x.clamp(min=y), pair),
    "sigmoid": (torch.sigmoid, floats),
    "relu": (torch.relu, floats),
    "relu6": (F.relu6, floats),
    "silu": (F.silu, floats),
    "gelu": (F.gelu, floats),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), floats),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), floats),
    "prelu": (lambda x, y: F.prelu(x, y[0]), pair),
    "elu": (lambda x: F.elu(x, 0.7), floats),
    "selu": (F.selu, floats),
    "celu": (lambda x: F.celu(x, 0.7), floats),
    "softplus": (F.softplus, floats),
    "softplus_beta": (lambda x: F.softplus(x, beta=2, threshold=3), floats),
    "hardswish": (F.hardswish, floats),
    "hardsigmoid": (F.hardsigmoid, floats),
    "hardtanh": (F.hardtanh, floats),
    "mish": (F.mish, floats),
    "logsigmoid": (F.logsigmoid, floats),
    "softsign": (F.softsign, floats),
    "tanhshrink": (F.tanhshrink, floats),
    "hardshrink": (F.hardshrink, floats),
    "softshrink": (F.softshrink, floats),
    "threshold": (lambda x: F.threshold(x, 0.1, 5.0), floats),
    "glu": (lambda x: F.glu(torch.cat((x, x * 2), -1)), floats),
    "where": (torch.where, condition),
    "where_scalar": (lambda c, x, y: torch.where(c, x, 0.0), condition),
    "where_int": (lambda x, y: torch.where(x > y, x, 0), integer_pair),
    "where_bool": (lambda x, y: torch.where(x, y, ~y), flags),
    "masked_fill": (lambda c, x, y: x.masked_fill(c, float("-inf")), condition),
    "masked_fill_bool": (lambda x, y: x.masked_fill(y, False), flags),
    "eq": (lambda x, y: x == y, integer_pair),
    "ne_scalar": (lambda x: x != 3, integers),
    "lt": (lambda x, y: x < y, pair),
    "le_mixed": (lambda x, y: x <= y, mixed_pair),
    "gt_int_and_float_scalar": (lambda x: x > 0.5, integers),
    "ge_size": (lambda x: x >= x.shape[0] // 2, integers),
    "and": (lambda x, y: x & y, flags),
    "or": (lambda x, y: x | y, flags),
    "xor": (lambda x, y: x ^ y, flags),
    "not": (lambda x, y: ~x, flags),
    "logical": (lambda x, y: torch.logical_and(x, torch.logical_not(y)), integer_pair),
    "bitwise_int": (lambda x, y: (x & y) | ~x, integer_pair),
    "isnan": (torch.isnan, specials),
    "isinf": (torch.isinf, specials),
    "isfinite": (torch.isfinite, specials),
    "nan_to_num": (torch.nan_to_num, specials),
    "nan_to_num_given": (lambda x: torch.nan_to_num(x, 1.0, 2.0, -3.0), specials),
    "isin": (torch.isin, integer_pair),
    "to_int": (lambda x: x.to(torch.int32), floats),
    "to_half_and_back": (lambda x: x.half().float(), floats),
    "to_bfloat16_and_back": (lambda x: x.bfloat16().float(), floats),
    "half_arithmetic": (lambda x: (x.half() * 3 + 1).float(), floats),
    "to_bool": (lambda x: x.bool(), integers),
    "type_as": (lambda x, y: x.type_as(y), mixed_pair),
    "byte_arithmetic": (lambda x: x * 3 + 1, bytes_),
    "byte_to_float": (lambda x: (x.float() - 128) * 0.1, bytes_),
}


@pytest.mark.parametrize("name", CASES)
def test_elementwise_operator_equals_torch(onnx: Any, name: str) -> None:
    onnx.check_case(CASES, name)
