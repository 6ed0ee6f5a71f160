"""The nearest of some vectors, for many at a time."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 13
"""Vectors whose products with a codebook are held at a time: some megabytes."""


def nearest_vectors(vectors: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the nearest vectors of a codebook.

    Args:
        vectors: [..., d] float32.
        codebook: [n, d] float32, n at most 256.

    Returns:
        Codes [...] uint8, and squared distances [...] float32.
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    half_norm = codebook.square().sum(1) / 2
    codes = torch.empty(len(flat), dtype=torch.uint8)
    distance = flat.square().sum(1)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        # |v - c|^2 = |v|^2 - 2 (v.c - |c|^2 / 2), where rounding may fall below 0.
        closeness, code = torch.addmm(-half_norm, flat[part], codebook.T).max(dim=1)
        codes[part] = code
        distance[part].sub_(closeness, alpha=2).clamp_(min=0)
    return codes.reshape(vectors.shape[:-1]), distance.reshape(vectors.shape[:-1])
