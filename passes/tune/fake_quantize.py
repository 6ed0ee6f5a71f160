"""Rounding to a grid whose derivative is that of what was rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """`hard`, whose gradient goes to `soft` as it is.

    Args:
        soft: What was rounded, floating.
        hard: What it was rounded to, of the same shape.

    Source: Bengio et al. 2013 (arXiv 1308.3432).
    """
    # torch leaves `apply` without types.
    passed: Tensor = _StraightThrough.apply(soft, hard)  # type: ignore[no-untyped-call]
    return passed


def fake_quantize(
    values: Tensor, offset: Tensor | None, scale: Tensor, zero_point: Tensor, top: int
) -> Tensor:
    """``(clamp(round(values / scale + offset) + zero_point, 0, top) - zero_point) * scale``.

    The result is what codes decode to, exactly. Rounding passes gradients on; what is clamped gives
    them to scale and zero point alone.

    Args:
        values: Float32 ``[..., g]``.
        offset: Moves values across the middle between two codes, of their shape; or None.
        scale: Broadcast against `values`, never 0.
        zero_point: Whole numbers, likewise.
        top: The largest code.
    """
    # torch leaves `apply` without types.
    decoded: Tensor = _FakeQuantize.apply(values, offset, scale, zero_point, top)  # type: ignore[no-untyped-call]
    return decoded


def quantized_codes(
    values: Tensor, offset: Tensor | None, scale: Tensor, zero_point: Tensor, top: int
) -> Tensor:
    """The codes, uint8, that `fake_quantize` decodes."""
    steps = values / scale
    if offset is not None:
        steps = steps + offset
    return steps.round_().add_(zero_point).clamp_(0, top).to(torch.uint8)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        del ctx, soft
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        del ctx
        return gradient, None


class _FakeQuantize(torch.autograd.Function):
    """By hand: a chain of single operators takes three times as long, and as much memory."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        offset: Tensor | None,
        scale: Tensor,
        zero_point: Tensor,
        top: int,
    ) -> Tensor:
        steps = values / scale
        if offset is not None:
            steps = steps + offset
        codes = steps.round_().add_(zero_point)
        inside = (codes >= 0) & (codes <= top)
        whole = codes.clamp_(0, top).sub_(zero_point)
        ctx.has_offset = offset is not None
        ctx.save_for_backward(values, scale, zero_point, whole, inside)
        return whole * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, zero_point, whole, inside = ctx.saved_tensors
        by_values, has_offset, by_scale, by_zero, _ = ctx.needs_input_grad
        passed = gradient * inside
        of_scale = of_zero = None
        if by_scale:
            of_scale = (gradient * whole).sub_(passed * values / scale).sum_to_size(scale.shape)
        if by_zero:
            of_zero = (gradient - passed).mul_(-scale).sum_to_size(zero_point.shape)
        of_offset = passed * scale if has_offset else None
        return (passed if by_values else None), of_offset, of_scale, of_zero, None
