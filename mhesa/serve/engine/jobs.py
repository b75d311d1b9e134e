"""What the decode loop is asked to do, and the queue in which clients take turns."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from mhesa.serve.engine.text import Choice

Item = TypeVar("Item")


class Busy(Exception):  # noqa: N818 not an error of ours
    """The queue is full; come again later."""


class Stopped(Exception):  # noqa: N818 not an error of ours
    """The engine was closed before the job was done."""


class Job:
    """A prompt to read, and the texts to write behind it.

    Where nothing is to be written, the last token is left unread: it changes nothing that is asked for.

    Args:
        ids: the prompt's tokens, at least one.
        choices: texts to write; none to read only.
        client: whose it is, for fairness.
        state: `(depth, 1, dim_mhesa)` to begin from; zeros if omitted.
        score: note the log-probability of each prompt token but the first in `logprobs`, in pieces.
        top: how many of the likeliest tokens to note beside each of those, in `likeliest`.
        stream: wake whenever there is news, not only at the end.
        keep_state: leave the state behind the first choice in `state`.
        wake: called when there is news, as the engine's `tell` sees to.
    """

    def __init__(
        self,
        ids: np.ndarray,
        choices: list[Choice],
        *,
        client: str = "",
        state: Tensor | None = None,
        score: bool = False,
        top: int = 0,
        stream: bool = False,
        keep_state: bool = False,
        wake: Callable[[], object] = lambda: None,
    ) -> None:
        self.ids, self.choices, self.client, self.state = ids, choices, client, state
        self.score, self.top, self.stream, self.keep_state, self.wake = score, top, stream, keep_state, wake
        self.logprobs: list[Tensor] = []
        self.likeliest: list[list[tuple[int, float]]] = []
        self.created = time.perf_counter()
        self.first_token: float | None = None
        self.error: Exception | None = None
        self.done = False
        self.read = 0
        self.open = sum(choice.finish is None for choice in choices)
        self.length = len(ids) if self.open else len(ids) - 1

    @property
    def places(self) -> int:
        """Slots that it takes."""
        return max(1, len(self.choices))


class Turns(Generic[Item]):
    """A queue in which clients take turns, however much one of them brings.

    >>> turns = Turns()
    >>> for client, item in [("a", 1), ("a", 2), ("a", 3), ("b", 4)]:
    ...     turns.push(client, item)
    >>> [turns.pop() for _ in range(len(turns))]
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
        """Take an item out; whether it was there."""
        queue = self._queues.get(client, deque())
        if item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._queues[client]
        return True


def wake(jobs: list[Job]) -> None:
    """Tell those who wait for jobs."""
    for job in jobs:
        job.wake()
