"""Work on several threads whose results come in order, a little ahead of whoever uses them and no more."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def threads() -> ThreadPoolExecutor:
    """A thread for each core."""
    return ThreadPoolExecutor(os.cpu_count())


def ordered(pool: ThreadPoolExecutor, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`map` on a pool's threads in order, a few items ahead and no more."""
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > pool._max_workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def batches(items: Iterable[A], size_of: Callable[[A], int], least: int) -> Iterator[list[A]]:
    """Items in lists whose sizes come to `least` or a little more, the last one apart.

    >>> list(batches(["ab", "c", "def", "g"], len, least=3))
    [['ab', 'c'], ['def'], ['g']]
    """
    batch: list[A] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= least:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
