"""Jobs for the decode thread, and the queue in which they wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from mhesa.inference.continuation import Continuation

Item = TypeVar("Item")


class Busy(Exception):  # noqa: N818 not an error of ours
    """The queue is full."""


class Stopped(Exception):  # noqa: N818 not an error of ours
    """The decode thread was stopped before the job was done."""


class Job:
    """A prompt to read, and the texts to write behind it.

    Without texts the prompt's last token is not read, because no prediction behind it is needed.

    Args:
        ids: the prompt's tokens, `(tokens,)`, at least one.
        texts: what to write; none to read only.
        client: who sent it; clients take turns.
        state: `(depth, 1, dim_mhesa)` to begin from; zeros if omitted.
        score: note the log-probability of each prompt token but the first in `logprobs`.
        top: how many of the likeliest tokens to note beside each of those, in `likeliest`.
        stream: report progress, not only the end.
        keep_state: leave the state behind the first text in `state`.
        wake: called when there is progress to report.
    """

    def __init__(
        self,
        ids: np.ndarray,
        texts: Sequence[Continuation] = (),
        *,
        client: str = "",
        state: Tensor | None = None,
        score: bool = False,
        top: int = 0,
        stream: bool = False,
        keep_state: bool = False,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self.ids, self.texts, self.client, self.state = ids, list(texts), client, state
        self.score, self.top, self.stream, self.keep_state, self.wake = score, top, stream, keep_state, wake
        self.logprobs: list[Tensor] = []
        self.likeliest: list[list[tuple[int, float]]] = []
        self.created = time.perf_counter()
        self.first_token: float | None = None
        self.error: Exception | None = None
        self.done = False
        # Prompt tokens read so far, and to read.
        self.read = 0
        self.unfinished = sum(text.finish is None for text in self.texts)
        self.length = len(ids) if self.unfinished else len(ids) - 1

    @property
    def slots(self) -> int:
        """How many slots it takes."""
        return max(1, len(self.texts))


class FairQueue(Generic[Item]):
    """A queue in which clients take turns, however many items one of them has.

    >>> queue = FairQueue()
    >>> for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4)]:
    ...     queue.push(client, item)
    >>> [queue.pop() for _ in range(len(queue))]
    [1, 4, 2, 3]
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def push(self, client: str, item: Item) -> None:
        """Add an item at the end of its client's queue."""
        self._queues.setdefault(client, deque()).append(item)

    def peek(self) -> Item:
        """The item whose turn it is."""
        return next(iter(self._queues.values()))[0]

    def pop(self) -> Item:
        """Take the item whose turn it is; its client goes behind the others."""
        client, queue = next(iter(self._queues.items()))
        item = queue.popleft()
        del self._queues[client]
        if queue:
            self._queues[client] = queue
        return item

    def remove(self, client: str, item: Item) -> bool:
        """Take an item out; returns whether it was there."""
        queue = self._queues.get(client, deque())
        if item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._queues[client]
        return True


def wake(jobs: list[Job]) -> None:
    """Call each job's `wake`."""
    for job in jobs:
        job.wake()
