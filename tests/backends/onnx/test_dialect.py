"""The `qc::` operators in standard ONNX give what their references give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.backends.onnx.emitter import OnnxEmitter
from qcompile.errors import TargetError
from qcompile.frontends.torch_export import capture_module
from qcompile.ir import dialect
from qcompile.kernels.gated_act.reference import ACTIVATIONS

qc = torch.ops.qc
assert dialect.NAMESPACE == "qc"

Inputs = Callable[[int], tuple[Tensor, ...]]


def vectors(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, 8), torch.randn(8), torch.randn(8)


def gates(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 8), torch.randn(n, 8)


def rotary(n: int) -> tuple[Tensor, ...]:
    """Heads of 8 channels of which 6 turn."""
    angle = torch.randn(1, n, 3)
    return torch.randn(2, 4, n, 8), angle.cos(), angle.sin()


def rotary_all(n: int) -> tuple[Tensor, ...]:
    angle = torch.randn(2, n, 4)
    return torch.randn(2, 3, n, 8), angle.cos(), angle.sin()


def attention(n: int) -> tuple[Tensor, ...]:
    """``n`` queries over ``n + 3`` keys in grouped heads; the second row is padded on the left."""
    mask = torch.ones(2, n + 3, dtype=torch.int64)
    mask[1, :2] = 0
    return torch.randn(2, 4, n, 8), torch.randn(2, 2, n + 3, 8), torch.randn(2, 2, n + 3, 6), mask


def attention_mask(n: int) -> tuple[Tensor, ...]:
    """A boolean mask with a row where nothing may be attended to."""
    mask = torch.rand(2, 1, n, n) > 0.4
    mask[0, 0, 1] = False
    return torch.randn(2, 4, n, 8), torch.randn(2, 4, n, 8), torch.randn(2, 4, n, 8), mask


def caches(n: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 3, n, 4), torch.randn(2, 3, 5, 4)


def activations(n: int) -> tuple[Tensor, ...]:
    """Rows of 40, one of them zero."""
    x = torch.randn(n, 40)
    x[1] = 0
    return (x,)


def codes(n: int) -> tuple[Tensor, ...]:
    """uint8 codes ``[n, 40]`` in groups of 16 (the last one short), half scales, zero points."""
    return (
        torch.randint(0, 16, (n, 40), dtype=torch.uint8),
        (torch.rand(n, 3) * 0.1 + 0.01).half(),
        torch.randint(0, 16, (n, 3), dtype=torch.uint8),
    )


def static(size: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, of inputs whose first has a last axis that does not vary."""

    def checked(x: Tensor, *rest: Tensor) -> Tensor:
        torch._check(x.shape[-1] == size)
        return function(x, *rest)

    return checked


def turn(size: int, interleaved: bool) -> Callable[..., Tensor]:
    """Rotation of heads of 8 channels by tables of a fixed width."""

    def function(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        torch._check(cos.shape[-1] == size)
        torch._check(sin.shape[-1] == size)
        return qc.rope(x, cos, sin, interleaved)

    return static(8, function)


def _dequantize(groups: int, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        for per_group in (scale, zero_point):
            torch._check(per_group.shape[-1] == groups)
        return function(codes, scale, zero_point)

    return checked


def _through_floats(x: Tensor, table: str, group_size: int) -> Tensor:
    scale = qc.float_scale(x, table, group_size)
    return qc.lookup(qc.quantize_float(x, scale, table, group_size), scale, table, group_size)


def _attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    plain = {"mask": None, "key_mask": None, "sinks": None, "scale": 0.3, "causal": False}
    return qc.attention(q, k, v, **{**plain, "window": 0, "softcap": 0.0, **how})


CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "rms_norm": (lambda x, w, b: qc.rms_norm(x, w, 1e-6), vectors),
    "rms_norm_core": (lambda x, w, b: qc.rms_norm(x, None, 1e-6), vectors),
    "layer_norm": (lambda x, w, b: qc.layer_norm(x, w, b, 1e-5), vectors),
    "layer_norm_core": (static(8, lambda x, w, b: qc.layer_norm(x, None, None, 1e-5)), vectors),
    **{f"act_{kind}": ((lambda k: lambda x, y: qc.act(x, k))(kind), gates) for kind in ACTIVATIONS},
    "gated_act": (lambda x, y: qc.gated_act(x, y, "silu"), gates),
    "rope_partial": (turn(3, False), rotary),
    "rope_partial_interleaved": (turn(3, True), rotary),
    "rope": (turn(4, False), rotary_all),
    "rope_interleaved": (turn(4, True), rotary_all),
    "attention": (lambda q, k, v, m: _attend(q, k, v), attention),
    "attention_causal": (
        lambda q, k, v, m: _attend(q, k, v, key_mask=m, causal=True),
        attention,
    ),
    "attention_window": (
        lambda q, k, v, m: _attend(q, k, v, key_mask=m, causal=True, window=3),
        attention,
    ),
    "attention_softcap": (
        lambda q, k, v, m: _attend(q, k, v, causal=True, softcap=2.0),
        attention,
    ),
    "attention_sinks": (
        lambda q, k, v, m: _attend(q, k, v, key_mask=m, sinks=torch.arange(4.0), causal=True),
        attention,
    ),
    "attention_boolean_mask": (lambda q, k, v, m: _attend(q, k, v, mask=m), attention_mask),
    "attention_additive_mask": (
        lambda q, k, v, m: _attend(
            q, k, v, mask=torch.zeros(m.shape).masked_fill(~m, float("-inf"))
        ),
        attention_mask,
    ),
    "kv_append": (qc.kv_append, caches),
    "dynamic_scale": (lambda x: qc.dynamic_scale(x, 8, 0), activations),
    "dynamic_scale_groups": (lambda x: qc.dynamic_scale(x, 4, 16), activations),
    "quantize": (
        lambda x: qc.quantize(x, qc.dynamic_scale(x, 8, 0), None, 8, 0),
        activations,
    ),
    "quantize_groups": (
        lambda x: qc.quantize(x, qc.dynamic_scale(x, 5, 16), None, 5, 16),
        activations,
    ),
    "quantize_with_zero_point": (
        lambda x: qc.quantize(x, torch.tensor([0.1]), torch.tensor([7], dtype=torch.uint8), 4, 0),
        activations,
    ),
    "quantize_round_trip": (
        lambda x: qc.dequantize(
            qc.quantize(x, qc.dynamic_scale(x, 8, 16), None, 8, 16),
            qc.dynamic_scale(x, 8, 16),
            None,
            8,
            16,
        ),
        activations,
    ),
    **{
        f"{table}_round_trip_{size}": (
            (lambda t, g: lambda x: _through_floats(x, t, g))(table, size),
            activations,
        )
        for table in ("e4m3", "e5m2", "e2m1", "e1m2", "e3m0", "e3m2", "e2m5")
        for size in (0, 16)
    },
    "dequantize": (_dequantize(3, lambda c, s, z: qc.dequantize(c, s, z, 4, 16)), codes),
    "dequantize_symmetric": (
        _dequantize(3, lambda c, s, z: qc.dequantize(c, s, None, 4, 16)),
        codes,
    ),
    "dequantize_one_group": (
        _dequantize(3, lambda c, s, z: qc.dequantize(c, s[:, :1], None, 4, 0)),
        codes,
    ),
}


for _name, (_function, _inputs) in CASES.items():
    if _inputs in (activations, codes):
        CASES[_name] = static(40, _function), _inputs


@pytest.mark.parametrize("name", CASES)
def test_dialect_operator_equals_its_reference(onnx: Any, name: str) -> None:
    onnx.check_case(CASES, name)


class QuantizedLinear(nn.Module):
    """A linear whose weight is codes, as passes leave it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randint(0, 16, (5, 40), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(5, 3) * 0.1)
        self.register_buffer("zero_point", torch.randint(0, 16, (5, 3), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        weight = qc.dequantize(self.codes, self.scale, self.zero_point, 4, 16)
        return torch.nn.functional.linear(x, weight)


def test_linear_over_codes_equals_torch(onnx: Any) -> None:
    onnx.check(QuantizedLinear(), activations, atol=1e-5)


def test_codes_of_small_floats_that_leave_the_model_are_refused() -> None:
    class Codes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return qc.quantize_float(x, qc.float_scale(x, "e4m3", 0), "e4m3", 0)

    program = capture_module(Codes(), *activations(2))
    with pytest.raises(TargetError, match="codes of small floats that are not only decoded"):
        OnnxEmitter().emit(program)
