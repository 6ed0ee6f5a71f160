"""Hadamard matrices of many orders: square, of entries +1 and -1, with ``H H^T = n``.

An order ``n = m 2^k`` is the Kronecker product of a *core* of order ``m`` and Sylvester's matrix of
order ``2^k``. Cores come from Paley's constructions over the fields of ``p`` and ``p^2`` elements,
and, where these have none, from Williamson's of four symmetric circulants.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LARGEST_CORE = 256
"""The largest core that is looked for: a core is multiplied as a dense matrix."""

_WILLIAMSON = {
    92: (
        "+++++-++---++---++-++++",
        "+-+++--++-+--+-++--+++-",
        "+-+--+++++----+++++--+-",
        "+--++-+-+------+-+-++--",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "++++---+--++----+-+--+-+----++--+---+++",
    ),
    172: (
        "+++++-++----+-++--++-++-++--++-+----++-++++",
        "+++---++--+-+-+-++--------++-+-+-+--++---++",
        "++-+-++++-+--+--+++--++--+++--+--+-++++-+-+",
        "+-++-----++++-+-+++-++++-+++-+-++++-----++-",
    ),
}
"""First rows of four symmetric circulants whose squares sum to ``order`` times the identity. The
tests of this module multiply them out."""


def has_order(n: int) -> bool:
    """Whether `matrix` knows a Hadamard matrix of an order."""
    return n >= 1 and core_order(n) is not None


def largest_block(n: int) -> int:
    """The largest divisor of `n` that `matrix` knows an order for; 1 if there is none but 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and has_order(d))


@functools.cache
def core_order(n: int) -> int | None:
    """The smallest core ``m`` with ``n = m 2^k``; None if no such core is known.

    Example:
        >>> core_order(576), core_order(1536), core_order(64), core_order(9)
        (36, 12, 1, None)
    """
    if n < 1:
        raise ValueError(f"there is no matrix of order {n}")
    power = n & ~(n - 1)
    odd = n // power
    candidates = [1] if odd == 1 else [odd * 2**k for k in range(2, power.bit_length())]
    for candidate in candidates:
        if candidate <= LARGEST_CORE and _construction(candidate) is not None:
            return candidate
    return None


@functools.cache
def core(order: int) -> Tensor:
    """A core: int8 ``[order, order]`` of +1 and -1, not to be written to.

    Raises:
        ValueError: No construction gives this order.
    """
    match _construction(order):
        case "one":
            return torch.ones(1, 1, dtype=torch.int8)
        case "paley-1":
            return _paley_1(order - 1)
        case "paley-2":
            return _paley_2(order // 2 - 1)
        case "williamson":
            return _williamson(_WILLIAMSON[order])
    raise ValueError(f"no core of order {order} is known")


def matrix(n: int) -> Tensor:
    """The Hadamard matrix of an order, not normalized: int8 ``[n, n]``.

    Raises:
        ValueError: No matrix of this order is known.
    """
    order = core_order(n)
    if order is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known")
    return torch.kron(core(order), sylvester(n // order))


def sylvester(n: int) -> Tensor:
    """The Hadamard matrix of an order that is a power of two: int8 ``[n, n]``, symmetric."""
    result = torch.ones(1, 1, dtype=torch.int8)
    step = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    for _ in range(n.bit_length() - 1):
        result = torch.kron(step, result)
    return result


def _construction(order: int) -> str | None:
    """How a core is made."""
    if order == 1:
        return "one"
    if order in _WILLIAMSON:
        return "williamson"
    if order % 4 == 0 and _is_field(order - 1):
        return "paley-1"
    half = order // 2 - 1
    if order % 4 == 0 and half % 4 == 1 and _is_field(half):
        return "paley-2"
    return None


def _is_field(q: int) -> bool:
    """Whether there is a field of q elements that `_jacobsthal` can make, of odd order."""
    root = math.isqrt(q)
    return _is_odd_prime(q) or (root * root == q and _is_odd_prime(root))


def _is_odd_prime(n: int) -> bool:
    return n > 2 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley_1(q: int) -> Tensor:
    """Order ``q + 1`` for ``q = 3 mod 4``. Source: Paley 1933, lemma 2."""
    skew = torch.ones(q + 1, q + 1, dtype=torch.int8)
    skew[1:, 0] = -1
    skew[0, 0] = 0
    skew[1:, 1:] = _jacobsthal(q)
    return skew + torch.eye(q + 1, dtype=torch.int8)


def _paley_2(q: int) -> Tensor:
    """Order ``2 (q + 1)`` for ``q = 1 mod 4``. Source: Paley 1933, lemma 4."""
    conference = torch.ones(q + 1, q + 1, dtype=torch.int8)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q)
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.int8), minus)


def _jacobsthal(q: int) -> Tensor:
    """Whether the difference of two field elements is a square (+1), no square (-1) or zero."""
    a = torch.arange(q)
    if _is_odd_prime(q):
        differences, squares = (a[:, None] - a[None, :]) % q, a * a % q
    else:
        # Elements x + y r of the field of p^2, as p x + y; r^2 is no square modulo p.
        p = math.isqrt(q)
        residues = {i * i % p for i in range(p)}
        radicand = next(i for i in range(2, p) if i not in residues)
        x, y = a // p, a % p
        differences = (x[:, None] - x) % p * p + (y[:, None] - y) % p
        squares = (x * x + radicand * y * y) % p * p + 2 * x * y % p
    character = torch.full((q,), -1, dtype=torch.int8)
    character[squares] = 1
    character[0] = 0
    return character[differences]


def _williamson(rows: tuple[str, ...]) -> Tensor:
    """Source: Williamson 1944; order 92 was first found by Baumert, Golomb and Hall 1962."""
    a, b, c, d = (_circulant(row) for row in rows)
    return torch.cat(
        [
            torch.cat(blocks, dim=1)
            for blocks in ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
        ]
    )


def _circulant(row: str) -> Tensor:
    first = torch.tensor([1 if sign == "+" else -1 for sign in row], dtype=torch.int8)
    return torch.stack([first.roll(i) for i in range(len(row))])
