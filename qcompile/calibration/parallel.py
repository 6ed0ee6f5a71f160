"""Work side by side whose results do not depend on how many threads there are."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from qcompile.formats.row_blocks import operators_on_one_thread

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Results of a function, in the order of the items, computed on as many threads as torch has.

    Each call runs on one thread, torch's operators included: how a product is summed up does not
    depend on the number of threads. Few results wait to be taken at a time.

    Args:
        function: Calls must not depend on each other.
        items: Its arguments.
    """
    workers = torch.get_num_threads()
    with operators_on_one_thread(), torch.no_grad():
        if workers == 1:
            for item in items:
                yield function(item)
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[R]] = deque()
            try:
                for item in items:
                    if len(waiting) > workers:
                        yield waiting.popleft().result()
                    waiting.append(pool.submit(_without_gradients(function), item))
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def _without_gradients(function: Callable[[T], R]) -> Callable[[T], R]:
    """Gradients are switched off thread by thread."""
    return torch.no_grad()(function)


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Matrix products in bfloat16 with float32 sums on CPUs that have tiles for that (AMX).

    Others compute in float32, and large products faster than by default: by oneDNN. Products of
    a few thousand numbers are slower so.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
