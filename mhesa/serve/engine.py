"""Continuous batching: one thread that reads prompts and writes texts, all of them a step at a time.

The states of the texts being written lie side by side in a slab, those in use always first, so that a step
works on a slice of it and nothing is gathered. Texts join and leave between two steps.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from mhesa.decoding import Decoder
from mhesa.sampling import draw
from mhesa.serve.text import Choice, Scored

# Prompt tokens read between two steps: what a long prompt may delay those who are writing.
PIECE = 512
# How often texts that are streamed are handed on: every TICK seconds, less often when there are so many
# that writing EVENTS events a second would be too much.
TICK = 0.01
EVENTS = 2000

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


class Row(NamedTuple):
    """A slot in use."""

    job: Job
    choice: Choice


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


class Engine:
    """Runs jobs on a decoder, in a thread of its own.

    Args:
        decoder: the model; nobody else may use it meanwhile.
        slab: `(depth, slots, dim_mhesa)`, where to keep the states of up to that many texts.
        queue: how many texts may wait for a slot; one client's share is half of them.
        waiting_tokens: how many prompt tokens may wait to be read.
        tell: is handed the jobs that there is news of, from the engine's thread; wakes them if omitted.
    """

    def __init__(
        self,
        decoder: Decoder,
        slab: Tensor,
        *,
        queue: int = 1024,
        waiting_tokens: int = 1 << 24,
        tell: Callable[[list[Job]], object] | None = None,
    ) -> None:
        self.decoder, self.slab, self.slots = decoder, slab, slab.shape[1]
        self.queue, self.waiting_tokens, self.tell = queue, waiting_tokens, tell or wake
        self.rows: list[Row] = []
        self.tokens_read = self.tokens_written = self.steps = self.failures = 0
        self.failure: BaseException | None = None
        # Should anybody ever read a free slot, everybody shall see it.
        slab.fill_(math.nan)
        self._before = torch.empty_like(slab)
        self._places = 0
        self._waiting: Turns[Job] = Turns()
        self._reading: Turns[Job] = Turns()
        self._news: list[Job] = []
        self._tell_at = 0.0
        self._load: Counter[str] = Counter()
        self._load_tokens = 0
        self._inbox: deque[tuple[str, Job]] = deque()
        self._lock = threading.Lock()
        self._ring = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="decode", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that wait for a slot."""
        with self._lock:
            return self._load.total()

    @property
    def reading(self) -> int:
        """Prompts that are being read."""
        return len(self._reading)

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, all of them or none.

        Raises:
            Busy: the queue is full, or this client's part of it.
            Stopped: the engine was closed.
        """
        jobs = list(jobs)
        free = self.slots - self._places
        with self._lock:
            if self._closed:
                raise Stopped("the server is shutting down")
            places = sum(job.places for job in jobs)
            tokens = sum(len(job.ids) for job in jobs)
            own = sum(self._load[client] for client in {job.client for job in jobs})
            total = self._load.total() - free
            if (
                total + places > self.queue
                or own - free + places > (self.queue + 1) // 2
                or (self._load_tokens and self._load_tokens + tokens > self.waiting_tokens)
            ):
                raise Busy("too many requests are waiting; try again in a moment")
            for job in jobs:
                self._load[job.client] += job.places
                self._load_tokens += len(job.ids)
                self._inbox.append(("submit", job))
        self._ring.set()

    def cancel(self, job: Job) -> None:
        """Forget a job, wherever it is; nothing more is heard of it."""
        self._inbox.append(("cancel", job))
        self._ring.set()

    def stop(self) -> None:
        """Fail every job that is left with `Stopped`, and take no more."""
        with self._lock:
            self._closed = True
        self._ring.set()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        self._thread.join()

    def state(self, job: Job) -> Tensor:
        """Where a job is, or begins: `(depth, 1, dim_mhesa)`."""
        return torch.zeros_like(self.slab[:, :1]) if job.state is None else job.state

    # The thread

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closed:
                    self._take_inbox()
                    self._admit()
                    self._read()
                    self._write()
                    self._hand_on()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._lock:
                self._closed = True
            self._fail_all()

    def _take_inbox(self) -> None:
        if not (self.rows or len(self._reading) or len(self._waiting)):
            self._ring.wait()
        self._ring.clear()
        while self._inbox:
            what, job = self._inbox.popleft()
            if what == "submit":
                self._waiting.push(job.client, job)
            else:
                self._drop(job)

    def _admit(self) -> None:
        while len(self._waiting) and self._places + self._waiting.peek().places <= self.slots:
            job = self._waiting.pop()
            self._places += job.places
            self._forget_load(job)
            if job.length:
                self._reading.push(job.client, job)
            else:
                self._end(job)

    def _forget_load(self, job: Job) -> None:
        with self._lock:
            self._load[job.client] -= job.places
            self._load_tokens -= len(job.ids)
            if not self._load[job.client]:
                del self._load[job.client]

    def _drop(self, job: Job) -> None:
        if job.done:
            return
        job.done = True
        if self._waiting.remove(job.client, job):
            self._forget_load(job)
            return
        if not self._reading.remove(job.client, job):
            for index in reversed(range(len(self.rows))):
                if self.rows[index].job is job:
                    self._leave(index)
        self._places -= job.places

    def _fail(self, job: Job, error: Exception) -> None:
        if job.done:
            return
        self.failures += 1
        job.error = error
        self._drop(job)
        self._news.append(job)

    def _fail_all(self) -> None:
        self._take_rest()
        jobs = [row.job for row in self.rows]
        while len(self._reading):
            jobs.append(self._reading.pop())
        while len(self._waiting):
            jobs.append(self._waiting.pop())
        for job in dict.fromkeys(jobs):
            job.error, job.done = Stopped("the server is shutting down"), True
            self._news.append(job)
        self.rows = []
        self.tell(self._news)

    def _take_rest(self) -> None:
        while self._inbox:
            what, job = self._inbox.popleft()
            if what == "submit":
                self._waiting.push(job.client, job)

    # Reading prompts

    def _read(self) -> None:
        room, work = PIECE, []
        while room > 0 and len(self._reading):
            job = self._reading.pop()
            piece = torch.from_numpy(job.ids[job.read : min(job.length, job.read + room)].astype(np.int64))
            work.append((job, piece.to(self.decoder.device)))
            room -= len(piece)
        plain = [(job, piece) for job, piece in work if not job.score]
        if plain:
            self._read_together(plain)
        for job, piece in work:
            if job.score:
                self._read_scored(job, piece)

    def _read_together(self, work: list[tuple[Job, Tensor]]) -> None:
        states = torch.cat([self.state(job) for job, _ in work], dim=1)
        try:
            logits = self.decoder.prefill([piece for _, piece in work], states)
        except Exception as error:
            if len(work) == 1:
                self._fail(work[0][0], error)
                return
            for one in work:
                self._read_together([one])
            return
        for index, (job, piece) in enumerate(work):
            job.state = states[:, index : index + 1]
            self._advance(job, len(piece), logits[index : index + 1])

    def _read_scored(self, job: Job, piece: Tensor) -> None:
        state = self.state(job).clone()
        try:
            logits = self.decoder.predict(piece, state)
        except Exception as error:
            self._fail(job, error)
            return
        targets = torch.from_numpy(job.ids[job.read + 1 : job.read + len(piece) + 1].astype(np.int64))
        own, likeliest = score(logits[: len(targets)], targets, job.top)
        job.logprobs.append(own)
        job.likeliest += likeliest
        job.state = state
        self._advance(job, len(piece), logits[-1:])

    def _advance(self, job: Job, count: int, logits: Tensor) -> None:
        job.read += count
        self.tokens_read += count
        if job.read < job.length:
            self._reading.push(job.client, job)
        elif not job.open:
            self._end(job)
        else:
            self._join(job, logits)

    def _join(self, job: Job, logits: Tensor) -> None:
        job.first_token = time.perf_counter()
        first = len(self.rows)
        self.rows += [Row(job, choice) for choice in job.choices]
        self.slab[:, first : len(self.rows)] = self.state(job)
        self._take(logits.expand(len(job.choices), -1), first)

    # Writing

    def _write(self) -> None:
        count = len(self.rows)
        if not count:
            return
        ids = torch.tensor([row.choice.last for row in self.rows], device=self.decoder.device)
        slab = self.slab[:, :count]
        self._before[:, :count].copy_(slab)
        try:
            logits = self.decoder.step(ids, slab)
        except Exception:
            slab.copy_(self._before[:, :count])
            self._write_each()
            return
        self.steps += 1
        self._take(logits, 0)

    def _write_each(self) -> None:
        """A step in which each row is alone, so that one that fails takes no other with it."""
        for row in list(self.rows):
            if row.job.done:
                continue
            index = self.rows.index(row)
            ids = torch.tensor([row.choice.last], device=self.decoder.device)
            try:
                logits = self.decoder.step(ids, self.slab[:, index : index + 1])
            except Exception as error:
                self._fail(row.job, error)
            else:
                self._take(logits, index)

    def _take(self, logits: Tensor, first: int) -> None:
        """Draw a token for each row of `logits`, which belong to the slots from `first` on."""
        rows = self.rows[first : first + len(logits)]
        tokens = draw(logits, [row.choice.sampler for row in rows])
        self._note(logits, rows, tokens)
        self.tokens_written += len(rows)
        ended, failed = [], []
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True), first):
            if token < 0:
                failed.append(row.job)
            elif row.choice.take(token):
                ended.append(index)
        for index in reversed(ended):
            row = self.rows[index]
            if row.job.keep_state:
                row.job.state = self.slab[:, index : index + 1].clone()
            self._leave(index)
            row.job.open -= 1
            if not row.job.open:
                self._end(row.job)
        for job in failed:
            self._fail(job, ArithmeticError("the model's prediction is not a number"))

    @staticmethod
    def _note(logits: Tensor, rows: list[Row], tokens: list[int]) -> None:
        """Keep the log-probabilities of those that asked for them."""
        wanted = [
            index
            for index, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if row.choice.top is not None and 0 <= token != row.choice.vocabulary.end
        ]
        if not wanted:
            return
        targets = torch.tensor([tokens[index] for index in wanted])
        most = max(rows[index].choice.top or 0 for index in wanted)
        own, likeliest = score(logits[wanted], targets, most)
        for index, logprob, top in zip(wanted, own.tolist(), likeliest, strict=True):
            choice = rows[index].choice
            choice.scores.append(Scored(len(choice.data), tokens[index], logprob, top[: choice.top]))

    def _leave(self, index: int) -> None:
        """Free a slot: the last one's text moves into it."""
        last = len(self.rows) - 1
        if index != last:
            self.slab[:, index] = self.slab[:, last]
            self.rows[index] = self.rows[last]
        self.slab[:, last] = math.nan
        self.rows.pop()

    def _end(self, job: Job) -> None:
        self._places -= job.places
        job.done = True
        self._news.append(job)

    def _hand_on(self) -> None:
        now = time.perf_counter()
        if now >= self._tell_at and self.rows:
            streams = {row.job: None for row in self.rows if row.job.stream}
            self._news += streams
            self._tell_at = now + max(TICK, len(streams) / EVENTS)
        if self._news:
            self.tell(self._news)
            self._news = []


def wake(jobs: list[Job]) -> None:
    """Tell those who wait for jobs."""
    for job in jobs:
        job.wake()


def score(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, list[list[tuple[int, float]]]]:
    """Log-probabilities in nats of `targets`, `(rows,)`, under `logits`, `(rows, num_tokens)`.

    Returns:
        fp64 `(rows,)`, and for each row the `top` likeliest tokens with theirs.

    >>> score(torch.zeros(1, 4), torch.tensor([2]), 0)[0].exp().item()
    0.25
    """
    logprobs = logits.double().log_softmax(-1)
    own = logprobs.gather(1, targets.to(logits.device)[:, None])[:, 0].cpu()
    values, tokens = logprobs.topk(min(top, logits.shape[1]))
    return own, [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
