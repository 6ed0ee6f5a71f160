"""The oracle of `qc::add_sparse`."""

import torch
from torch import Tensor


def add_sparse(base: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """A matrix to which a few numbers of each row are added.

    Args:
        base: [..., N, K] floating.
        index: [..., N, M] int16 or int32: the columns, each at most once in a row.
        values: [..., N, M] floating: what is added there.

    Returns:
        [..., N, K] of the type of `base`.
    """
    return torch.scatter_add(base, -1, index.to(torch.int64), values.to(base.dtype))
