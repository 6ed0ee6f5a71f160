"""The operators of the lowered program that have Triton kernels.

Each is registered with its oracle, which runs on any device. On CUDA tensors `linear` is the
Triton kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import MissingExtraError
from qcompile.ir import dialect
from qcompile.kernels.quantized_linear import reference


def triton_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    k: int,
    bits: int,
    group_size: int,
    rounding: str,
) -> Tensor:
    """`reference.quantized_linear` by the Triton kernel; float64, which only checks use, by itself.

    Raises:
        MissingExtraError: If triton is not installed.
    """
    operands = (x, packed, scale, zero_point, bias, k, bits, group_size, rounding)
    if x.dtype == torch.float64:
        return reference.quantized_linear(*operands)
    try:
        from qcompile.kernels.triton.quantized_linear import quantized_linear
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingExtraError("triton", extra="cuda", purpose="run the cuda target") from error
    return quantized_linear(*operands)


def _linear_shape(x: Tensor, packed: Tensor, *rest: object) -> Tensor:
    del rest
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


def _embedding_shape(
    ids: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    k: int,
    bits: int,
    group_size: int,
) -> Tensor:
    del packed, zero_point, bits, group_size
    dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
    return torch.empty((*ids.shape, k), dtype=dtype, device=ids.device)


linear = dialect.define(reference.quantized_linear, shape=_linear_shape, differentiable=False)
embedding = dialect.define(
    reference.quantized_embedding, shape=_embedding_shape, differentiable=False
)
torch.library.impl("qc::quantized_linear", "CUDA", triton_linear)
