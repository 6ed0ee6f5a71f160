"""Orthogonal matrices that spread the largest channel, one after the other: DuQuant's rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels.hadamard.matrix import has_order
from qcompile.passes.transform.values import Hadamard, random_orthogonal


def greedy_rotation(rows: Tensor, block: int, steps: int, generator: torch.Generator) -> Tensor:
    """One rotation for all blocks of channels that makes tokens easy to round.

    Each step takes the channel ``c`` that holds the largest magnitude of what the steps before have
    left, and multiplies by ``E_c U E_c``, where ``E_c`` swaps channels 0 and c, and the first row
    of ``U`` has equal entries: the channel is spread evenly over its block. The first steps are
    kept, up to where the mean over tokens of the squared largest magnitude is least: with a scale
    per token, the squared rounding error grows with it.

    Args:
        rows: Activations ``[T, n]``.
        block: Channels per block; divides n.
        steps: How many to try.
        generator: For the part of U that is free.

    Returns:
        ``[block, block]`` float64, orthogonal; the identity if no step helps.

    Source: Lin et al. 2024 (DuQuant, arXiv 2406.01721), section 3.2. There, the first row of U is
    not uniform but for the identity in place of its free part, and the largest magnitude of all
    tokens decides.
    """
    spread = spreading_rotation(block, generator)
    narrow = spread.to(torch.float32)
    x = rows.to(torch.float32).reshape(-1, block)
    rotation = torch.eye(block, dtype=torch.float64)
    best, least = rotation, _squared_peaks(x, len(rows))
    for _ in range(steps):
        order = _swap(block, int(x.abs().amax(0).argmax()))
        x = (x[:, order] @ narrow)[:, order]
        rotation = (rotation[:, order] @ spread)[:, order]
        peaks = _squared_peaks(x, len(rows))
        if peaks < least:
            best, least = rotation, peaks
    return best


def spreading_rotation(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix ``[n, n]`` float64 whose first row is ``1/sqrt(n)``, else random.

    Where there is a Hadamard matrix of order n, all entries are of this size: rows and signs are
    what is random. Otherwise it is a rotation of all other channels, then the reflection that
    takes the first unit vector to the uniform one.
    """
    free = torch.zeros(n, n, dtype=torch.float64)
    free[0, 0] = 1
    if has_order(n):
        matrix = Hadamard(n, n).matrix()
        matrix = matrix * matrix[0].sign()
        rows = 1 + torch.randperm(n - 1, generator=generator)
        free[torch.arange(1, n), rows] = _signs(n - 1, generator)
        return free @ matrix
    free[1:, 1:] = random_orthogonal(n - 1, generator).rotation
    normal = torch.ones(n, dtype=torch.float64)
    normal[0] -= n**0.5
    return free - 2 * torch.outer(free @ normal, normal) / normal.dot(normal)


def zigzag(magnitude: Tensor, blocks: int) -> Tensor:
    """Deals channels to blocks, the largest first, back and forth, so that blocks are alike.

    Args:
        magnitude: Of each channel, ``[n]``.
        blocks: How many; divides n.

    Returns:
        ``[n]`` int64: the channel at each new place, block after block.
    """
    deals = torch.argsort(magnitude, descending=True, stable=True).reshape(-1, blocks)
    deals[1::2] = deals[1::2].flip(1)
    return deals.T.reshape(-1)


def _squared_peaks(x: Tensor, tokens: int) -> float:
    return float(x.reshape(tokens, -1).abs().amax(1).square().mean())


def _signs(n: int, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.float64)


def _swap(n: int, channel: int) -> Tensor:
    order = torch.arange(n)
    order[0], order[channel] = channel, 0
    return order
