"""Computes ``normal_grids.json``: codebooks of least squared error for normal numbers.

    python -m qcompile.kernels.lookup_vectors.fit_normal_grids normal_grids.json

A codebook of size ``points`` in ``dimension`` dimensions is where Lloyd's iteration comes to rest:
every entry is the mean of the normal numbers that are nearest to it. In one dimension these means
are integrals; in more they are sums over a fixed low-discrepancy sample and its mirror image.
Results depend on nothing but this file and the rounding of sums of products.

Sources: Lloyd 1982, "Least squares quantization in PCM"; Pages and Printems 2003, "Optimal
quadratic quantization for numerics: the Gaussian case"; Malinovskii et al. 2024 (HIGGS,
arXiv 2411.17525) for these grids on rotated weights.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

SIZES = (
    *((1, points) for points in (2, 4, 8, 16, 32, 64, 128, 256)),
    *((2, points) for points in (4, 8, 16, 32, 64, 128, 256)),
    *((4, points) for points in (16, 64, 256)),
)
"""Dimension and number of points of every grid in the file."""

_SAMPLES = 1 << 17  # and as many mirrored
_STEPS = 100
_CHUNK = 1 << 14


def fit_line(points: int) -> Tensor:
    """The grid in one dimension, ``[points, 1]`` float64, ascending.

    The means are exact; iterations are cheap, and go on until they change nothing any more.
    """
    quantiles = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    grid = torch.special.ndtri(quantiles) * math.sqrt(3)  # a density to the power 1/3: Panter, Dite
    for _ in range(200_000):
        middle = (grid[1:] + grid[:-1]) / 2
        edges = torch.cat((grid.new_tensor([-math.inf]), middle, grid.new_tensor([math.inf])))
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        mass = torch.special.ndtr(edges).diff()
        moved = (density[:-1] - density[1:]) / mass
        moved = (moved - moved.flip(0)) / 2  # the grid is symmetric, whatever rounding says
        if float((moved - grid).abs().max()) < 1e-13:
            break
        grid = moved
    line: Tensor = grid.unsqueeze(1)
    return line


def fit_vectors(dimension: int, points: int) -> Tensor:
    """The grid in several dimensions, ``[points, dimension]`` float64, by length, then entries."""
    grid = _lloyd(normal_sample(dimension), points)
    order = sorted(range(points), key=lambda i: (float(grid[i].norm()), grid[i].tolist()))
    return grid[order]


def normal_sample(dimension: int) -> Tensor:
    """Evenly spread normal vectors, ``[2 * _SAMPLES, dimension]`` float32, and mirror images."""
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=0)
    uniform = engine.draw(_SAMPLES, dtype=torch.float64).clamp_(1e-9, 1 - 1e-9)
    half = torch.special.ndtri(uniform).to(torch.float32)
    return torch.cat((half, -half))


def _lloyd(sample: Tensor, points: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    start = torch.randperm(len(sample), generator=generator)[:points]
    # The best points are spread wider than the sample: their density is a root of its density.
    grid = sample[start].to(torch.float64) * math.sqrt(1 + 2 / sample.shape[1])
    for _ in range(_STEPS):
        codes = _assign(sample, grid.to(torch.float32))
        count = torch.bincount(codes, minlength=points)
        total = torch.zeros_like(grid).index_add_(0, codes, sample.to(torch.float64))
        used = (count > 0).unsqueeze(1)
        grid = torch.where(used, total / count.clamp(min=1).unsqueeze(1), grid)
    return grid


def _assign(sample: Tensor, grid: Tensor) -> Tensor:
    """Nearest points, int64."""
    half_norm = grid.square().sum(1) / 2
    return torch.cat([(part @ grid.T - half_norm).argmax(1) for part in sample.split(_CHUNK)])


def main() -> None:
    """Writes the file that the one argument names."""
    torch.set_num_threads(1)  # sums are the same on every machine with this many
    grids = {}
    for dimension, points in SIZES:
        grid = fit_line(points) if dimension == 1 else fit_vectors(dimension, points)
        grids[f"{dimension}x{points}"] = [[float(f"{x:.7g}") for x in row] for row in grid.tolist()]
        print(dimension, points, file=sys.stderr, flush=True)
    lines = [f' "{name}": {json.dumps(grid)}' for name, grid in grids.items()]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
