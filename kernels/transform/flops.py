"""What `qc::transform` takes: additions and multiplications, by its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qcompile.kernels.hadamard.matrix import core_order


def hadamard_flops(n: int, block: int, signed: bool) -> int:
    """Operations of a Hadamard transform of a vector: additions, its core, its scale, its signs.

    Args:
        n: Channels.
        block: Channels per matrix, an order that `core_order` knows.
        signed: Whether channels are multiplied by signs.
    """
    core = core_order(block)
    assert core is not None
    additions = (block // core).bit_length() - 1
    dense = 2 * core if core > 1 else 0
    return n * (additions + dense + 1 + signed)


def transform_flops(n: int, params: Sequence[Sequence[int]], kind: str, dims: Sequence[int]) -> int:
    """Operations of a transform of one vector.

    Args:
        n: Channels.
        params: Shapes of the parameters of `qc::transform`.
        kind: As there.
        dims: As there.
    """
    return _flops(n, iter(kind.split("+")), iter(params), iter(dims))


def _flops(
    n: int, kinds: Iterator[str], params: Iterator[Sequence[int]], dims: Iterator[int]
) -> int:
    match next(kinds):
        case "diagonal" | "shift":
            next(params)
            return n
        case "permutation":
            next(params)
            return 0
        case "hadamard":
            block, _, signed = next(dims), next(dims), next(dims)
            if signed:
                next(params)
            return hadamard_flops(n, block, bool(signed))
        case "matrix":
            return 2 * n * next(params)[-1]
        case "compose":
            return sum(_flops(n, kinds, params, dims) for _ in range(next(dims)))
        case "block_diagonal":
            sizes = [next(dims) for _ in range(next(dims))]
            return sum(_flops(size, kinds, params, dims) for size in sizes)
    return 0  # the identity
