"""Products with normalized Hadamard matrices in O(n log n)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.kernels.hadamard.matrix import core, core_order


def hadamard(x: Tensor, block: int, transposed: bool) -> Tensor:
    """``x (I kron H / sqrt(block))`` along the last axis: one Hadamard matrix per block.

    ``H`` is the Kronecker product of a core of order m (see `qcompile.kernels.hadamard.matrix`) and
    Sylvester's matrix of order ``block / m``. The latter takes ``log2`` steps of additions; only
    the core is multiplied as a matrix.

    Args:
        x: ``[..., n]`` floating, `block` divides n.
        block: An order that `matrix` knows.
        transposed: Whether to multiply with the transposed matrix, which is the inverse.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: No Hadamard matrix of this order is known, or it does not divide n.
    """
    order = core_order(block)
    if order is None or x.shape[-1] % block:
        raise ValueError(f"no Hadamard transform in blocks of {block} on {x.shape[-1]} channels")
    y = _walsh(x.unflatten(-1, (-1, order, block // order)))
    if order > 1:
        factor = core(order).to(device=x.device, dtype=x.dtype)
        y = (factor if transposed else factor.T) @ y
    return y.flatten(-3) * (1 / math.sqrt(block))


def _walsh(x: Tensor) -> Tensor:
    """The product with Sylvester's matrix along the last axis, a power of two."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.unflatten(-1, (size // (2 * half), 2, half))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x
