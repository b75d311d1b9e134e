"""Jobs for the decode thread, and the queue in which they wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from mhesa.inference.continuation import Continuation
from mhesa.inference.statistics import Statistic

Item = TypeVar("Item")


class Busy(Exception):  # noqa: N818 not an error of ours
    """The queue is full."""


class Stopped(Exception):  # noqa: N818 not an error of ours
    """The decode thread was stopped before the job was done."""


@dataclass(eq=False)
class Job:
    """A prompt to read, and the texts that are to continue it.

    Without texts the prompt's last token is not read, because nothing is predicted after it.

    Args:
        ids: the prompt's tokens, `(tokens,)`, at least one.
        texts: texts to write; none to read only.
        client: the name of who sent it; clients take turns.
        state: state to begin from, `(depth, 1, state_size)`; zeros if omitted.
        score: measure each prompt token but the first.
        statistics: what else to compute of the prediction of each of those, by name.
        top: number of the likeliest tokens to record beside each of those.
        stream: report progress, not only the end.
        keep_state: leave the state after the first text in `state` at the end.

    Attributes:
        logprobs: log-probabilities of the prompt tokens that were measured, in nats, `(tokens - 1,)`.
        measured: statistics of each of them, by name, fp64 `(tokens - 1,)`.
        likeliest: the likeliest tokens beside each of them, if `top` asks for some.
        wake: called when there is progress to report.
    """

    ids: np.ndarray
    texts: Sequence[Continuation] = ()
    client: str = ""
    state: Tensor | None = None
    score: bool = False
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    top: int = 0
    stream: bool = False
    keep_state: bool = False

    def __post_init__(self) -> None:
        self.wake: Callable[[], object] = lambda: None
        # Small arrays that stay, made between large ones that go, would keep the heap from shrinking.
        self.logprobs = np.empty(len(self.ids) - 1 if self.score else 0)
        self.measured = {name: np.empty_like(self.logprobs) for name in self.statistics}
        self.likeliest: list[list[tuple[int, float]]] = []
        self.created = time.perf_counter()
        self.first_token: float | None = None
        self.error: Exception | None = None
        self.done = False
        self.unfinished = sum(text.finish is None for text in self.texts)
        # Prompt tokens to read, and those read so far.
        self.length = len(self.ids) if self.unfinished else len(self.ids) - 1
        self.read = 0

    @property
    def slots(self) -> int:
        """How many slots the job takes."""
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

    def __bool__(self) -> bool:
        return bool(self._queues)

    def push(self, client: str, item: Item) -> None:
        """Add an item at the end of its client's queue."""
        self._queues.setdefault(client, deque()).append(item)

    def peek(self) -> Item:
        """The item whose turn it is."""
        return next(iter(self._queues.values()))[0]

    def pop(self) -> Item:
        """Take the item whose turn it is; its client's next turn comes after the other clients'."""
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
