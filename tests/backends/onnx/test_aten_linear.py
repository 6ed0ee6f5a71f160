"""Products, attention, convolution, pooling, normalization, against torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = Callable[[int], tuple[Tensor, ...]]


def matrices(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 5), torch.randn(5, 6), torch.randn(6)


def batches(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, 5), torch.randn(n, 5, 6), torch.randn(n, 3, 6)


def heads(n: int) -> tuple[Tensor, ...]:
    """Queries, keys, values ``[B, H, S, D]`` and a mask with a row where nothing is allowed."""
    allowed = torch.rand(2, 1, n, n + 2) > 0.4
    allowed[:, :, 0] = True
    allowed[1, :, 1] = False
    shapes = (2, 4, n, 8), (2, 4, n + 2, 8), (2, 4, n + 2, 8)
    return (*(torch.randn(shape) for shape in shapes), allowed)


def grouped_heads(n: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, n, 8), torch.randn(2, 2, n, 8), torch.randn(2, 2, n, 8)


def signal(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 4, 11), torch.randn(6, 4, 3), torch.randn(6)


def image(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 4, 9, 8), torch.randn(6, 4, 3, 2), torch.randn(6)


def varying_image(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 4, n + 4, n + 5),)


def vectors(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, 8), torch.randn(8), torch.randn(8)


CASES: dict[str, tuple[Callable[..., Any], Inputs]] = {
    "mm": (lambda x, y, c: x.mm(y), matrices),
    "addmm": (lambda x, y, c: torch.addmm(c, x, y, beta=0.5, alpha=2), matrices),
    "linear": (lambda x, y, c: F.linear(x, y.t(), c), matrices),
    "mv": (lambda x, y, c: y.mv(c), matrices),
    "outer": (lambda x, y, c: torch.outer(x[:, 0], c), matrices),
    "matmul_vector": (lambda x, y, c: torch.matmul(x @ y, c), matrices),
    "bmm": (lambda x, y, c: x.bmm(y), batches),
    "baddbmm": (lambda x, y, c: torch.baddbmm(c, x, y, alpha=0.5), batches),
    "matmul_broadcast": (lambda x, y, c: torch.matmul(x[:, None], y[:1]), batches),
    "einsum": (lambda x, y, c: torch.einsum("b i k, b k j -> b j i", x, y), batches),
    "attention": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v), heads),
    "attention_scale": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, scale=0.3),
        heads,
    ),
    "attention_causal": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        heads,
    ),
    "attention_mask": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        heads,
    ),
    "attention_bias": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m.float() * 3),
        heads,
    ),
    "attention_grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        grouped_heads,
    ),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), signal),
    "conv1d_same": (lambda x, w, b: F.conv1d(x, w, b, padding="same", dilation=2), signal),
    "conv1d_unbatched": (lambda x, w, b: F.conv1d(x[0], w, b), signal),
    "conv_transpose1d": (
        lambda x, w, b: F.conv_transpose1d(x, w.transpose(0, 1), b, stride=2, output_padding=1),
        signal,
    ),
    "max_pool1d": (lambda x, w, b: F.max_pool1d(x, 3, 2, 1), signal),
    "avg_pool1d": (lambda x, w, b: F.avg_pool1d(x, 3, 2, 1), signal),
    "adaptive_avg_pool1d": (lambda x, w, b: F.adaptive_avg_pool1d(x, 4), signal),
    "upsample_nearest1d": (lambda x, w, b: F.interpolate(x, scale_factor=2.0), signal),
    "upsample_linear": (lambda x, w, b: F.interpolate(x, size=17, mode="linear"), signal),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 0)), image),
    "conv2d_same": (lambda x, w, b: F.conv2d(x, w, b, padding="same"), image),
    "conv2d_depthwise": (
        lambda x, w, b: F.conv2d(x, w[:4, :1], b[:4], groups=4, dilation=2),
        image,
    ),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w.transpose(0, 1), b, stride=2, padding=1),
        image,
    ),
    "max_pool2d": (lambda x, w, b: F.max_pool2d(x, 3, 2, padding=1), image),
    "max_pool2d_ceil": (lambda x, w, b: F.max_pool2d(x, 2, 2, ceil_mode=True), image),
    "avg_pool2d": (lambda x, w, b: F.avg_pool2d(x, (3, 2)), image),
    "avg_pool2d_no_pad": (
        lambda x, w, b: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        image,
    ),
    "adaptive_avg_pool2d_1": (lambda x, w, b: F.adaptive_avg_pool2d(x, 1), image),
    "adaptive_avg_pool2d": (lambda x, w, b: F.adaptive_avg_pool2d(x, (4, 3)), image),
    "adaptive_max_pool2d": (lambda x, w, b: F.adaptive_max_pool2d(x, (4, 1)), image),
    "upsample_nearest": (lambda x, w, b: F.interpolate(x, scale_factor=1.5), image),
    "upsample_nearest_exact": (
        lambda x, w, b: F.interpolate(x, size=(13, 5), mode="nearest-exact"),
        image,
    ),
    "upsample_bilinear": (
        lambda x, w, b: F.interpolate(x, size=(13, 5), mode="bilinear"),
        image,
    ),
    "upsample_bilinear_corners": (
        lambda x, w, b: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        image,
    ),
    "upsample_bicubic": (
        lambda x, w, b: F.interpolate(x, scale_factor=2, mode="bicubic"),
        image,
    ),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, b[:4], b[:4]), image),
    "group_norm_plain": (lambda x, w, b: F.group_norm(x, 4), image),
    "instance_norm": (lambda x, w, b: F.instance_norm(x), image),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, b[:4], b[:4].square(), b[:4], b[:4]),
        image,
    ),
    "batch_norm_plain": (
        lambda x, w, b: F.batch_norm(x, b[:4], b[:4].square()),
        image,
    ),
    "global_pool_of_varying_image": (lambda x: F.adaptive_avg_pool2d(x, 1), varying_image),
    "upsample_varying_image": (
        lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 1), mode="bilinear"),
        varying_image,
    ),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (8,), w, b), vectors),
    "layer_norm_plain": (lambda x, w, b: F.layer_norm(x, (3, 8), eps=1e-3), vectors),
    "rms_norm": (lambda x, w, b: F.rms_norm(x, (8,), w, 1e-6), vectors),
    "rms_norm_default_eps": (lambda x, w, b: F.rms_norm(x, (8,)), vectors),
    "local_response_norm": (lambda x, w, b: F.local_response_norm(x, 2), image),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_with_sums_equals_torch(onnx: Any, name: str) -> None:
    onnx.check_case(CASES, name, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_weight_is_stored_transposed(onnx: Any, bias: bool) -> None:
    model = nn.Linear(6, 5, bias=bias)
    onnx.check(model, lambda n: (torch.randn(n, 3, 6),))
    program = onnx.capture(model, torch.randn(4, 3, 6))
    graph = onnx.emit(program)
    assert [call.op_type for call in graph.model.graph] == ["MatMul", "Add"][: 1 + bias]
    assert graph.weights["weight.transposed"].spec.shape == (6, 5)
    assert "weight" not in graph.weights


class TiedTable(nn.Module):
    """Gathers rows of a table and multiplies by it: it must be stored once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_tied_table_is_stored_once(onnx: Any) -> None:
    onnx.check(TiedTable(), lambda n: (torch.randint(0, 11, (2, n)),))
    graph = onnx.emit(onnx.capture(TiedTable(), torch.randint(0, 11, (2, 4))))
    assert [weight.spec.shape for weight in graph.weights.values()] == [(11, 6)]
