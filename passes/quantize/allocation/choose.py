"""The least loss that a budget can buy: one option of each item, by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MOST_UNITS = 1 << 16
"""Budgets are counted in so many units at most; costs are rounded up to whole ones."""


def choose(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """One option for each item, of the least total loss within a budget.

    The choice is the best there is where costs beyond the cheapest options have a large common
    divisor, as those of weights in groups do. Else costs are rounded up, and up to an item's share
    of a 65,536th of the budget goes unused.

    Args:
        costs: Of each option of each item, whole numbers.
        losses: The same for what is to be small.
        budget: For the sum of costs.

    Returns:
        The index of each item's option. Of options that are equally good the first.

    Raises:
        ValueError: Even the cheapest options cost more.
    """
    cheapest = [min(item) for item in costs]
    spare = budget - sum(cheapest)
    if spare < 0:
        raise ValueError(f"the cheapest options cost {sum(cheapest)}, more than {budget}")
    excess = [[cost - least for cost in item] for item, least in zip(costs, cheapest, strict=True)]
    spare = min(spare, sum(max(item) for item in excess))
    unit = max(math.gcd(*(cost for item in excess for cost in item)), 1)
    unit *= -(-spare // (unit * _MOST_UNITS)) or 1
    size = spare // unit + 1
    best = np.zeros(size)
    taken: list[npt.NDArray[np.uint8]] = []
    for item, loss in zip(excess, losses, strict=True):
        best, option = _add_item(best, [-(-cost // unit) for cost in item], loss)
        taken.append(option)
    return _walk_back(taken, [[-(-cost // unit) for cost in item] for item in excess], size - 1)


def _add_item(
    best: npt.NDArray[np.float64], costs: Sequence[int], losses: Sequence[float]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """The least loss for every budget with one more item, and the option that it takes."""
    least = np.full(len(best), np.inf)
    option = np.zeros(len(best), np.uint8)
    for index, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        if cost >= len(best):
            continue
        candidate = best[: len(best) - cost] + loss
        better = candidate < least[cost:]
        least[cost:][better] = candidate[better]
        option[cost:][better] = index
    return least, option


def _walk_back(
    taken: Sequence[npt.NDArray[np.uint8]], costs: Sequence[Sequence[int]], left: int
) -> list[int]:
    chosen = []
    for option, item in zip(reversed(taken), reversed(costs), strict=True):
        index = int(option[left])
        chosen.append(index)
        left -= item[index]
    return chosen[::-1]
