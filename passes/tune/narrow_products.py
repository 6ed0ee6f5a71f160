"""Products of linears in bfloat16, where the CPU has instructions for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def has_narrow_products() -> bool:
    """Whether the CPU multiplies bfloat16 numbers and adds products up in float32.

    Others would have to widen them first, which takes longer than products of float32.
    """
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` with factors rounded to bfloat16, in its derivatives too.

    Args:
        x: float32 ``[..., K]``.
        weight: float32 ``[N, K]``.
        bias: float32 ``[N]``.

    Returns:
        float32 ``[..., N]``, good to 3 digits.
    """
    # torch leaves `apply` without types.
    product: Tensor = _NarrowProduct.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    product = product.reshape(*x.shape[:-1], weight.shape[0])
    return product if bias is None else product + bias


class _NarrowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        narrow_x, narrow_weight = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(narrow_x, narrow_weight)
        return (narrow_x @ narrow_weight.T).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        by_x, by_weight = ctx.needs_input_grad
        narrow = gradient.to(torch.bfloat16)
        of_x = (narrow @ weight).to(torch.float32) if by_x else None
        of_weight = (narrow.T @ x).to(torch.float32) if by_weight else None
        return of_x, of_weight
