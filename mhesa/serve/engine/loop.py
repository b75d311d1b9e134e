"""Continuous batching: one thread that reads prompts and writes texts, all of them a step at a time.

Texts join and leave between two steps.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from mhesa.inference.decoder import Decoder
from mhesa.serve.engine.jobs import Busy, Job, Stopped, Turns, wake
from mhesa.serve.engine.slots import Slots, score

# Prompt tokens read between two steps: what a long prompt may delay those who are writing.
PIECE = 512
# How often texts that are streamed are handed on: every TICK seconds, less often when there are so many
# that writing EVENTS events a second would be too much.
TICK = 0.01
EVENTS = 2000


class Engine:
    """Runs jobs on a decoder, in a thread of its own.

    Args:
        decoder: the model; nobody else may use it meanwhile.
        slots: how many texts are written at the same time.
        queue: how many texts may wait for a slot; one client's share is half of them.
        waiting_tokens: how many prompt tokens may wait to be read.
        tell: is handed the jobs that there is news of, from the engine's thread; wakes them if omitted.
    """

    def __init__(
        self,
        decoder: Decoder,
        slots: int,
        *,
        queue: int = 1024,
        waiting_tokens: int = 1 << 24,
        tell: Callable[[list[Job]], object] | None = None,
    ) -> None:
        self.decoder, self.slots = decoder, Slots(decoder, slots)
        self.queue, self.waiting_tokens, self.tell = queue, waiting_tokens, tell or wake
        self.tokens_read = self.tokens_written = self.steps = self.failures = 0
        self.failure: BaseException | None = None
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
        free = self.slots.most - self._places
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
        return self.decoder.initial_state(1) if job.state is None else job.state

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
        if not (self.slots.rows or len(self._reading) or len(self._waiting)):
            self._ring.wait()
        self._ring.clear()
        while self._inbox:
            what, job = self._inbox.popleft()
            if what == "submit":
                self._waiting.push(job.client, job)
            else:
                self._drop(job)

    def _admit(self) -> None:
        while len(self._waiting) and self._places + self._waiting.peek().places <= self.slots.most:
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
            for index in reversed(range(len(self.slots.rows))):
                if self.slots.rows[index].job is job:
                    self.slots.leave(index)
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
        jobs = [row.job for row in self.slots.rows]
        while len(self._reading):
            jobs.append(self._reading.pop())
        while len(self._waiting):
            jobs.append(self._waiting.pop())
        for job in dict.fromkeys(jobs):
            job.error, job.done = Stopped("the server is shutting down"), True
            self._news.append(job)
        self.slots.rows = []
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
        first = self.slots.join(job, self.state(job))
        self._take(logits.expand(len(job.choices), -1), first)

    # Writing

    def _write(self) -> None:
        if not self.slots.rows:
            return
        try:
            logits = self.slots.step()
        except Exception:
            self._write_each()
            return
        self.steps += 1
        self._take(logits, 0)

    def _write_each(self) -> None:
        """A step in which each row is alone, so that one that fails takes no other with it."""
        for row in list(self.slots.rows):
            if row.job.done:
                continue
            index = self.slots.rows.index(row)
            try:
                logits = self.slots.step_one(index)
            except Exception as error:
                self._fail(row.job, error)
            else:
                self._take(logits, index)

    def _take(self, logits: Tensor, first: int) -> None:
        """Draw a token for each row of `logits`, which belong to the slots from `first` on."""
        slots = self.slots
        tokens = slots.draw(logits, first)
        self.tokens_written += len(tokens)
        ended, failed = [], []
        for index, token in enumerate(tokens, first):
            if token < 0:
                failed.append(slots.rows[index].job)
            elif slots.rows[index].choice.take(token):
                ended.append(index)
        for index in reversed(ended):
            job = slots.rows[index].job
            if job.keep_state:
                job.state = slots.state(index)
            slots.leave(index)
            job.open -= 1
            if not job.open:
                self._end(job)
        for job in failed:
            self._fail(job, ArithmeticError("the model's prediction is not a number"))

    def _end(self, job: Job) -> None:
        self._places -= job.places
        job.done = True
        self._news.append(job)

    def _hand_on(self) -> None:
        now = time.perf_counter()
        if now >= self._tell_at and self.slots.rows:
            streams = {row.job: None for row in self.slots.rows if row.job.stream}
            self._news += streams
            self._tell_at = now + max(TICK, len(streams) / EVENTS)
        if self._news:
            self.tell(self._news)
            self._news = []
