"""The oracle of `qc::lookup_vectors`."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from qcompile.kernels.hadamard.reference import hadamard
from qcompile.kernels.lookup_vectors.codebooks import codebook as codebook_of
from qcompile.kernels.quantize.groups import spread_groups

# Eager annotations, as in `kernels/quantize/reference.py`.


def lookup_vectors(
    codes: Tensor, scale: Tensor, codebook: str, group_size: int, block: int
) -> Tensor:
    """Values of codes: vectors of a codebook side by side, times scales, and turned back.

    Args:
        codes: [..., K / D] uint8, below the number of vectors, which have D values.
        scale: [..., G] floating, broadcast over the leading dimensions of `codes`.
        codebook: Name of one; see `qcompile.kernels.lookup_vectors.codebooks`.
        group_size: Values per scale along K; 0 means one scale.
        block: Order of the Hadamard matrix of each block of K that values were multiplied with
            (`turn`) before their codes were chosen, which is undone here; 0 where they were not.

    Returns:
        [..., K] float32, or float64 when `scale` is. Before they are turned, values are those of
        float32 in any case: that rounding of the product is part of what a weight decodes to, on
        every target and in every check.
    """
    table = codebook_tensor(codebook).to(codes.device)
    size = codes.shape[-1] * table.shape[1]
    values = table.index_select(0, codes.flatten().to(torch.int32))
    values = values.reshape(*codes.shape[:-1], size)
    result = values * spread_groups(scale.to(torch.float32), size, group_size)
    if scale.dtype == torch.float64:
        result = result.to(torch.float64)
    return turn_back(result, block) if block else result


def turn(x: Tensor, block: int) -> Tensor:
    """A randomized Hadamard transform of the last axis: ``x diag(signs) (I kron H / sqrt(block))``.

    Args:
        x: [..., K] floating; `block` divides K.
        block: Order of H.
    """
    return hadamard(x * turning_signs(x.shape[-1]).to(x), block, transposed=False)


def turn_back(x: Tensor, block: int) -> Tensor:
    """The inverse of `turn`."""
    return hadamard(x, block, transposed=True) * turning_signs(x.shape[-1]).to(x)


@lru_cache(maxsize=64)
def turning_signs(size: int) -> Tensor:
    """The random signs of `turn`, [size] int8 of +1 and -1, which depend on the size alone.

    They are bits of SHA-256, the same with every version of every library. Not to be written to.
    """
    digests = (hashlib.sha256(f"{size}:{i}".encode()).digest() for i in range(-(-size // 256)))
    bits = [byte >> bit & 1 for digest in digests for byte in digest for bit in range(8)]
    return torch.tensor(bits[:size], dtype=torch.int8) * 2 - 1


@lru_cache(maxsize=64)
def codebook_tensor(name: str) -> Tensor:
    """A codebook as a tensor, [points, dimension] float32; not to be written to."""
    return torch.tensor(codebook_of(name), dtype=torch.float32)
