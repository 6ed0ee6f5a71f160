"""Attention is recognized where it is spelled out, and where ATen has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.passes.infra import PassManager
from qcompile.passes.raise_ops.raise_attention import RaiseAttention
from qcompile.passes.raise_ops.raise_norms import RaiseNorms
from qcompile.passes.raise_ops.settle import Settle

B, H, S, T, D = 2, 4, 5, 7, 8


class Heads(nn.Module):
    """Splits queries, keys and values ``[B, ., H * D]`` into heads and attends."""

    def __init__(self, attend: Callable[..., Any], kv_heads: int = H) -> None:
        super().__init__()
        self.attend = attend
        self.heads = (H, kv_heads, kv_heads)

    def forward(self, *tensors: Tensor) -> Any:
        split = (x.unflatten(-1, (n, D)) for x, n in zip(tensors, self.heads, strict=False))
        return self.attend(*(x.transpose(1, 2) for x in split), *tensors[3:])


def repeat(x: Tensor) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, heads * 2, length, width)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ repeat(k).transpose(-1, -2) * 0.5, -1) @ repeat(v)


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = 30 * torch.tanh(q @ k.transpose(2, 3) * 0.5 / 30) + mask
    return torch.softmax(scores, -1) @ v


def forbidden(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(mask, float("-inf"))
    return torch.softmax(scores, -1) @ v


def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.where(mask, 0.5 * (q @ k.transpose(2, 3)), -1e9)
    return torch.softmax(scores, -1) @ v


def joined(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Batch and heads as one axis, a bias that is scaled together with the scores."""
    q, k, v = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
    bias = bias.repeat_interleave(H, 0)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
    weights = torch.softmax(scores.unflatten(0, (-1, H)) * 0.7, -1)
    return (weights.flatten(0, 1) @ v).unflatten(0, (-1, H))


def native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


def native_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.softmax(q @ k.transpose(2, 3), -1)
    return weights @ v, weights


def other_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3), -2) @ v


def capped_late(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(torch.tanh(q @ k.transpose(2, 3) + mask), -1) @ v


def qkv(kv_heads: int = H, queries: int = S) -> tuple[Tensor, ...]:
    keys = (B, T, kv_heads * D)
    return torch.randn(B, queries, H * D), torch.randn(keys), torch.randn(keys)


@pytest.mark.parametrize(
    ("attend", "example", "settings"),
    [
        (grouped, qkv(2), (0.5, False, 0, 0.0)),
        (native, qkv(), (D**-0.5, False, 0, 0.0)),
        (capped, (*qkv(), torch.randn(B, H, S, T)), (0.5, False, 0, 30.0)),
        (chosen, (*qkv(), torch.rand(B, H, S, T) < 0.7), (0.5, False, 0, 0.0)),
        (forbidden, (*qkv(), torch.rand(B, H, S, T) < 0.3), (0.5, False, 0, 0.0)),
        (joined, (*qkv(), torch.randn(B, S, T)), (0.35, False, 0, 0.0)),
    ],
    ids=["grouped", "native", "capped", "chosen", "forbidden", "joined"],
)
def test_attention_becomes_one_operator(
    attend: Callable[..., Any],
    example: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    after: Any,
) -> None:
    model = Heads(attend, kv_heads=example[1].shape[-1] // D)
    program = after(RaiseAttention(), model, example)

    (node,) = program.calls(torch.ops.qc.attention.default)
    assert node.args[6:] == pytest.approx(settings)
    assert node.args[1].meta["val"].shape[1] == example[1].shape[-1] // D  # no repeated heads
    assert not list(program.calls(torch.ops.aten.softmax.int, torch.ops.aten.matmul.default))
    torch.testing.assert_close(program(*example), model(*example), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attend", "example"),
    [
        (weights_returned, qkv()),
        (other_axis, qkv(queries=T)),
        (capped_late, (*qkv(), torch.randn(B, H, S, T))),
        (native_causal, qkv()),
    ],
    ids=["weights-returned", "other-axis", "capped-late", "causal-from-the-first-key"],
)
def test_what_is_not_our_attention_is_left_with_a_reason(
    attend: Callable[..., Any], example: tuple[Tensor, ...], after: Any
) -> None:
    model = Heads(attend)
    program = after(RaiseAttention(), model, example)

    assert not list(program.calls(torch.ops.qc.attention.default))
    torch.testing.assert_close(program(*example), model(*example))
    settled = PassManager([RaiseNorms(), Settle()]).run(program)[1][-1].result
    assert len(settled.skips) == 1
    assert "attention" in settled.skips[0].reason


def test_causal_attention_over_its_own_positions_is_raised(after: Any) -> None:
    def attend_to_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q + k[..., :1, :], q, is_causal=True)

    model = Heads(attend_to_itself)
    example = qkv(queries=T)
    program = after(RaiseAttention(), model, example)

    (node,) = program.calls(torch.ops.qc.attention.default)
    assert node.args[7] is True
    torch.testing.assert_close(program(*example), model(*example), rtol=1e-5, atol=1e-6)
