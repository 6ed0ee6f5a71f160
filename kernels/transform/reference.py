"""The oracle of `qc::transform`: a transform of the last axis, given as kinds and numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.kernels.hadamard.reference import hadamard

KINDS = (
    "identity",
    "diagonal",
    "shift",
    "permutation",
    "hadamard",
    "matrix",
    "compose",
    "block_diagonal",
)
"""The kinds of transforms and, in `transform`, the parameters and dims that each consumes."""


def transform(x: Tensor, params: list[Tensor], kind: str, dims: list[int]) -> Tensor:
    """``x T`` along the last axis.

    `kind` names a transform, or a tree of them in prefix order, joined by ``+``; each takes its
    parameters and dims from the front of what is left:

    =================  ====================================  ===================================
    kind               params                                dims
    =================  ====================================  ===================================
    identity
    diagonal           scale ``[n]``
    shift              offset ``[n]``
    permutation        index ``[n]`` int64: the result's channel i is channel ``index[i]``
    hadamard           signs ``[n]`` int8, if signed         block, transposed, signed
    matrix             ``[b, b]``, the same for all blocks
                       of b, or ``[n / b, b, b]``
    compose                                                  number of parts
    block_diagonal                                           number of parts, size of each
    =================  ====================================  ===================================

    A Hadamard transform multiplies by its signs first, transposed it does so last.

    Args:
        x: ``[..., n]`` floating.
        params: As above.
        kind: As above, such as ``"hadamard"`` or ``"compose+diagonal+permutation"``.
        dims: As above.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: A kind is unknown, or parameters or dims are left over.
    """
    rest = _Rest(iter(kind.split("+")), iter(params), iter(dims))
    result = _apply(x, rest)
    if any(next(left, None) is not None for left in (rest.kinds, rest.params, rest.dims)):
        raise ValueError(f"transform '{kind}' does not use all that it is given")
    return result.clone() if result is x else result


class _Rest:
    """What has not been consumed yet."""

    def __init__(self, kinds: Iterator[str], params: Iterator[Tensor], dims: Iterator[int]) -> None:
        self.kinds, self.params, self.dims = kinds, params, dims


def _apply(x: Tensor, rest: _Rest) -> Tensor:
    match next(rest.kinds, None):
        case "identity":
            return x
        case "diagonal":
            return x * next(rest.params).to(x.dtype)
        case "shift":
            return x + next(rest.params).to(x.dtype)
        case "permutation":
            return x.index_select(-1, next(rest.params))
        case "hadamard":
            return _hadamard(x, rest)
        case "matrix":
            return _matrix(x, next(rest.params).to(x.dtype))
        case "compose":
            for _ in range(next(rest.dims)):
                x = _apply(x, rest)
            return x
        case "block_diagonal":
            return _block_diagonal(x, rest)
        case kind:
            raise ValueError(f"unknown transform '{kind}'; known: {', '.join(KINDS)}")


def _hadamard(x: Tensor, rest: _Rest) -> Tensor:
    block, transposed, signed = next(rest.dims), next(rest.dims), next(rest.dims)
    signs = next(rest.params).to(x.dtype) if signed else None
    if signs is not None and not transposed:
        x = x * signs
    x = hadamard(x, block, bool(transposed))
    return x * signs if signs is not None and transposed else x


def _matrix(x: Tensor, matrix: Tensor) -> Tensor:
    order = matrix.shape[-1]
    if x.shape[-1] == order and matrix.dim() == 2:
        return x @ matrix
    blocks: Tensor = x.unflatten(-1, (-1, 1, order))
    return (blocks @ matrix).flatten(-3)


def _block_diagonal(x: Tensor, rest: _Rest) -> Tensor:
    count = next(rest.dims)
    sizes = [next(rest.dims) for _ in range(count)]
    return torch.cat([_apply(part, rest) for part in x.split(sizes, dim=-1)], dim=-1)
