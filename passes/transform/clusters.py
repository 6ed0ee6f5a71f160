"""Channels in clusters of like ranges, side by side: what static grids per cluster need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, fx

from qcompile.passes.quantize.activation_formats import ActivationFormat, Grid

_CLUSTERS = "qcompile.clusters"
"""In ``node.meta`` of a linear: how the channels of its input fall into clusters, in order."""

_ROUNDS = 50


def mark_clusters(linears: Iterable[fx.Node], sizes: Sequence[int]) -> None:
    """Notes the sizes of the clusters that the input channels of linears are in, side by side."""
    for linear in linears:
        linear.meta[_CLUSTERS] = tuple(sizes)


def clusters_of(linear: fx.Node) -> tuple[int, ...]:
    """Sizes of the clusters of a linear's input channels; one cluster where none were made."""
    x = linear.args[0]
    assert isinstance(x, fx.Node)
    whole = (int(x.meta["val"].shape[-1]),)
    sizes: tuple[int, ...] = linear.meta.get(_CLUSTERS, whole)
    return sizes if sum(sizes) == whole[0] else whole


def cluster_channels(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """Channels of like ranges together: k-means on pairs of least and largest value.

    Args:
        low: Least value of each channel, ``[n]``.
        high: Largest value of each channel, ``[n]``.
        count: Clusters at most.

    Returns:
        An order of the channels, ``[n]`` int64, in which clusters are side by side, narrow ones
        first; and the size of each cluster.
    """
    points = torch.stack((low, high), dim=1).to(torch.float64)
    by_width = torch.argsort(points[:, 1] - points[:, 0], stable=True)
    starts = torch.linspace(0, len(points) - 1, min(count, len(points))).round().to(torch.int64)
    centres = points[by_width[starts]]
    for _ in range(_ROUNDS):
        labels = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        sizes = labels.bincount(minlength=len(centres)).to(torch.float64)
        moved = torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    labels = torch.cdist(points, centres).argmin(1)
    rank = torch.argsort(torch.argsort(centres[:, 1] - centres[:, 0], stable=True))
    order = torch.argsort(rank[labels], stable=True)
    counts = rank[labels].bincount(minlength=len(centres))
    return order, [int(size) for size in counts if size > 0]


def cluster_grids(
    low: Tensor, high: Tensor, sizes: Sequence[int], format: ActivationFormat
) -> Grid[Tensor]:
    """One grid per cluster that spans what was seen of it, and zero.

    Args:
        low: Least value of each channel, ``[n]``.
        high: Largest value of each channel, ``[n]``.
        sizes: Of the clusters, side by side; they sum to n.
        format: Of the codes.

    Returns:
        Scale ``[n]`` float32 and zero point ``[n]`` uint8, the same within a cluster.
    """
    least = [part.amin().expand(len(part)) for part in low.split(list(sizes))]
    most = [part.amax().expand(len(part)) for part in high.split(list(sizes))]
    return format.grid(torch.cat(least), torch.cat(most))
