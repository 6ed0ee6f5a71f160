"""Groups along the last axis: the arithmetic that every grouped op shares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def group_count(size: int, group_size: int) -> int:
    """Number of groups that cover an axis; the last one may be short.

    Args:
        size: Length K of the grouped axis.
        group_size: Elements per group; 0 means one group over the whole axis.

    Returns:
        G = ceil(K / group_size), or 1 when `group_size` is 0.
    """
    return 1 if group_size == 0 else -(-size // group_size)


def split_groups(x: Tensor, group_size: int) -> Tensor:
    """Splits the last axis into groups, padding a short last group with zeros.

    Args:
        x: Values [..., K].
        group_size: Elements per group; 0 means one group over the whole axis.

    Returns:
        [..., G, group_size], a view where no padding is needed.
    """
    size = x.shape[-1]
    if group_size == 0:
        return x.unsqueeze(-2)
    groups = group_count(size, group_size)
    padding = groups * group_size - size
    padded = functional.pad(x, (0, padding)) if padding else x
    return padded.reshape(*x.shape[:-1], groups, group_size)


def spread_groups(per_group: Tensor, size: int, group_size: int) -> Tensor:
    """Repeats one value per group for each element of the group.

    Args:
        per_group: [..., G] with G = `group_count(size, group_size)`, or [..., 1] for one value
            that all groups share.
        size: Length K of the grouped axis.
        group_size: Elements per group; 0 means one group over the whole axis.

    Returns:
        [..., K], or [..., 1], which broadcasts against it, where one value is shared.

    Raises:
        ValueError: The last axis of `per_group` is neither G nor 1.
    """
    groups = per_group.shape[-1]
    if groups == 1:
        return per_group
    if groups != group_count(size, group_size):
        raise ValueError(
            f"{groups} groups given where {size} elements in groups of {group_size} "
            f"make {group_count(size, group_size)}"
        )
    repeated = per_group.unsqueeze(-1).expand(*per_group.shape, group_size)
    return repeated.flatten(-2)[..., :size]


def covering_scale(x: Tensor, largest: float, group_size: int) -> Tensor:
    """The scale of each group that lets its largest magnitude become a given level.

    Args:
        x: Values [..., K], any float dtype.
        largest: The level.
        group_size: Elements per group along K; 0 means one group.

    Returns:
        max|x| / largest of each group, [..., G], float32 (float64 for float64 input); 1 where that
        is 0. Not finite where the group is not.
    """
    peak = split_groups(at_least_float32(x), group_size).abs().amax(dim=-1)
    scale = peak / largest
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def at_least_float32(x: Tensor) -> Tensor:
    """The same values, float32 where they are narrower."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)
