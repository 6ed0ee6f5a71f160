"""Work on blocks of rows: each block on one thread, several blocks at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

BLOCK_ELEMENTS = 1 << 17  # half a megabyte of float32: the working set stays in a core's cache


def map_row_blocks(function: Callable[[int, int], T], rows: int, columns: int) -> list[T]:
    """Calls a function for consecutive ranges of rows, on as many threads as torch has.

    Within a block torch runs on one thread. Splitting its small operators over a team instead
    makes every operator wait for the slowest member, which on a machine with other work takes a
    hundred times longer.

    Args:
        function: Gets the first row and the one past the last. Calls must not depend on each
            other.
        rows: Number of rows.
        columns: Elements in a row, which sets how many rows make a block.

    Returns:
        The results, in the order of the rows.
    """
    step = max(1, BLOCK_ELEMENTS // max(1, columns))
    ranges = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    workers = min(torch.get_num_threads(), len(ranges))
    with operators_on_one_thread():
        if workers <= 1:
            return [function(start, stop) for start, stop in ranges]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda block: function(*block), ranges))


@contextmanager
def operators_on_one_thread() -> Iterator[None]:
    """Torch's operators run on the thread that calls them, here and on threads made inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
