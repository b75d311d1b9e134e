"""The thread that reads prompts and writes all texts together, one token of each in a step."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from mhesa.inference.continuation import Continuation
from mhesa.inference.decoder import Decoder
from mhesa.inference.logprobs import token_logprobs
from mhesa.inference.slots import Slots
from mhesa.inference.statistics import token_statistics
from mhesa.serve.engine.jobs import Busy, FairQueue, Job, Stopped

# Prompt tokens read between two steps: a bound on how long a prompt delays the texts being written.
PIECE = 512
# Logits of scored prompt tokens that are in memory at once.
LOGITS = 1 << 22
# Prompt tokens that may wait to be read.
WAITING_TOKENS = 1 << 24
# Streams get their new text every TICK_SECONDS; less often if all streams together would get more than
# EVENTS_PER_SECOND.
TICK_SECONDS = 0.01
EVENTS_PER_SECOND = 2000


class DecodeThread:
    """Runs jobs on a decoder, in a separate thread. Texts join and leave between two steps.

    Args:
        decoder: the model, for this thread alone; writes `max_batch` texts at the same time.
        num_tokens: size of the tokenizer, see `Slots`.
        queue: number of texts that may wait for a slot; one client may take half of it.
        notify: called from the thread with the jobs that have progress to report.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_tokens: int | None = None,
        queue: int = 1024,
        notify: Callable[[list[Job]], object],
    ) -> None:
        self.decoder, self.size = decoder, decoder.max_batch
        # NaN, as `Slots.remove` leaves it.
        self.slots = Slots(decoder, decoder.initial_state(self.size).fill_(math.nan), num_tokens)
        self.queue, self.notify = queue, notify
        # Tokens of a scored prompt that are read at once.
        self._most_scored = max(1, LOGITS // decoder.num_tokens)
        self.tokens_read = self.tokens_written = self.steps = self.failures = 0
        self.failure: BaseException | None = None
        self._before_step = torch.empty_like(self.slots.states)
        # Slots that are taken: by texts being written, and by jobs whose prompts are being read.
        self._taken = 0
        self._waiting: FairQueue[Job] = FairQueue()
        self._reading: FairQueue[Job] = FairQueue()
        # Jobs taken from `_reading`, whose next pieces are being read.
        self._being_read: list[Job] = []
        self._writing: dict[Continuation, Job] = {}
        self._progress: list[Job] = []
        self._next_tick = 0.0
        # Texts that wait for a slot, by client, and the tokens of their prompts.
        self._waiting_texts: Counter[str] = Counter()
        self._waiting_tokens = 0
        self._inbox: deque[tuple[str, Job]] = deque()
        self._lock = threading.Lock()
        self._new_work = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="decode", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """Texts being written."""
        return len(self._writing)

    @property
    def waiting(self) -> int:
        """Texts that wait for a slot."""
        with self._lock:
            return self._waiting_texts.total()

    @property
    def reading(self) -> int:
        """Prompts being read."""
        return len(self._reading)

    @property
    def state_bytes(self) -> int:
        """The size of a text's state."""
        return self.slots.states.nbytes // self.size

    def submit(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, all of them or none.

        Raises:
            Busy: the queue is full, or this client's part of it.
            Stopped: the thread was stopped.
        """
        jobs = list(jobs)
        free = self.size - self._taken
        with self._lock:
            if self._closed:
                raise Stopped("the server is shutting down")
            texts = sum(job.slots for job in jobs)
            tokens = sum(len(job.ids) for job in jobs)
            own = sum(self._waiting_texts[client] for client in {job.client for job in jobs})
            total = self._waiting_texts.total() - free
            if (
                total + texts > self.queue
                or own - free + texts > (self.queue + 1) // 2
                or (self._waiting_tokens and self._waiting_tokens + tokens > WAITING_TOKENS)
            ):
                raise Busy("too many requests are waiting; try again in a moment")
            for job in jobs:
                self._waiting_texts[job.client] += job.slots
                self._waiting_tokens += len(job.ids)
                self._inbox.append(("submit", job))
        self._new_work.set()

    def cancel(self, job: Job) -> None:
        """Drop a job, waiting or running; it is not reported any more."""
        self._inbox.append(("cancel", job))
        self._new_work.set()

    def stop(self) -> None:
        """Take no more jobs, and end the unfinished ones with the error `Stopped`."""
        with self._lock:
            self._closed = True
        self._new_work.set()

    def close(self) -> None:
        """Stop, and wait for the thread to end."""
        self.stop()
        self._thread.join()

    def state(self, job: Job) -> Tensor:
        """The state after all that was read and written of a job, `(depth, 1, state_size)`."""
        return self.decoder.initial_state(1) if job.state is None else job.state

    # The methods below run in the thread.

    def _main(self) -> None:
        try:
            with torch.inference_mode():
                while not self._closed:
                    if not (self._writing or self._reading or self._waiting):
                        self._new_work.wait()
                    if self._new_work.is_set():
                        self._new_work.clear()
                    self._take_inbox()
                    self._admit()
                    self._read()
                    self._write()
                    self._report()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            with self._lock:
                self._closed = True
            self._fail_all("the server is shutting down" if self.failure is None else "the model failed")

    def _take_inbox(self) -> None:
        while self._inbox:
            what, job = self._inbox.popleft()
            if what == "submit":
                self._waiting.push(job.client, job)
            else:
                self._drop(job)

    def _admit(self) -> None:
        while self._waiting and self._taken + self._waiting.peek().slots <= self.size:
            job = self._waiting.pop()
            self._taken += job.slots
            self._leave_queue(job)
            if job.length:
                self._reading.push(job.client, job)
            else:
                self._end(job)

    def _leave_queue(self, job: Job) -> None:
        with self._lock:
            self._waiting_texts[job.client] -= job.slots
            self._waiting_tokens -= len(job.ids)
            if not self._waiting_texts[job.client]:
                del self._waiting_texts[job.client]

    def _end(self, job: Job) -> None:
        self._taken -= job.slots
        job.done = True
        self._progress.append(job)

    def _drop(self, job: Job) -> None:
        if job.done:
            return
        job.done = True
        if self._waiting.remove(job.client, job):
            self._leave_queue(job)
            return
        if not self._reading.remove(job.client, job):
            for slot in reversed(range(self.active)):
                if self._writing[self.slots.texts[slot]] is job:
                    self._free(slot)
        self._taken -= job.slots

    def _free(self, slot: int) -> None:
        del self._writing[self.slots.texts[slot]]
        self.slots.remove(slot)

    def _fail(self, job: Job, error: Exception) -> None:
        if job.done:
            return
        self.failures += 1
        job.error = error
        self._drop(job)
        self._progress.append(job)

    def _fail_all(self, reason: str) -> None:
        jobs = [*self._writing.values(), *self._being_read]
        for queue in (self._reading, self._waiting):
            jobs += [queue.pop() for _ in range(len(queue))]
        jobs += [job for what, job in self._inbox if what == "submit"]
        self._writing.clear()
        for job in dict.fromkeys(jobs):
            if not job.done:
                job.error, job.done = Stopped(reason), True
                self._progress.append(job)
        self.notify(self._progress)

    # Reading prompts

    def _read(self) -> None:
        """Read up to `PIECE` tokens, from one prompt or several."""
        room, work = PIECE, []
        while room > 0 and self._reading:
            job = self._reading.pop()
            self._being_read.append(job)
            most = min(room, self._most_scored) if job.score else room
            piece = torch.from_numpy(job.ids[job.read : min(job.length, job.read + most)].astype(np.int64))
            work.append((job, piece.to(self.decoder.device)))
            room -= len(piece)
        plain = [(job, piece) for job, piece in work if not job.score]
        if plain:
            self._read_together(plain)
        for job, piece in work:
            if job.score:
                self._read_scored(job, piece)
        # Not reached if the thread fails: `_fail_all` ends these jobs then.
        self._being_read = []

    def _read_together(self, work: list[tuple[Job, Tensor]]) -> None:
        states = torch.cat([self.state(job) for job, _ in work], dim=1)
        try:
            logits = self.decoder.prefill([piece for _, piece in work], states)
        except Exception as error:
            if len(work) == 1:
                self._fail(work[0][0], error)
                return
            # One prompt by itself, so that only the one at fault fails.
            for one in work:
                self._read_together([one])
            return
        for index, (job, piece) in enumerate(work):
            job.state = states[:, index : index + 1]
            self._advance(job, len(piece), logits[index : index + 1])

    def _read_scored(self, job: Job, piece: Tensor) -> None:
        state = self.state(job).clone()
        targets = torch.from_numpy(job.ids[job.read + 1 : job.read + len(piece) + 1].astype(np.int64))
        try:
            logits = self.decoder.predict(piece, state)
            own, likeliest = token_logprobs(logits[: len(targets)], targets, job.top)
            measured = token_statistics(logits[: len(targets)], targets, job.statistics)
        except Exception as error:
            self._fail(job, error)
            return
        tokens = slice(job.read, job.read + len(targets))
        job.logprobs[tokens] = own.numpy()
        for name, values in measured.items():
            job.measured[name][tokens] = values
        if job.top:
            job.likeliest += likeliest
        job.state = state
        self._advance(job, len(piece), logits[-1:])

    def _advance(self, job: Job, count: int, logits: Tensor) -> None:
        job.read += count
        self.tokens_read += count
        if job.read < job.length:
            self._reading.push(job.client, job)
        elif not job.unfinished:
            self._end(job)
        else:
            self._start_writing(job, logits)

    # Writing

    def _start_writing(self, job: Job, logits: Tensor) -> None:
        job.first_token = time.perf_counter()
        self._writing.update(dict.fromkeys(job.texts, job))
        self.tokens_written += len(job.texts)
        self._finish_texts(self.slots.add(job.texts, self.state(job), logits))

    def _write(self) -> None:
        count = self.active
        if not count:
            return
        states, before = self.slots.used_states, self._before_step[:, :count]
        before.copy_(states)
        try:
            logits = self.slots.read()
        except Exception:
            states.copy_(before)
            self._write_each()
            return
        self.steps += 1
        self.tokens_written += count
        self._finish_texts(self.slots.draw(logits))

    def _write_each(self) -> None:
        """Step each text by itself, so that only the one at fault fails."""
        for text, job in list(self._writing.items()):
            if job.done:
                continue
            slot = self.slots.texts.index(text)
            try:
                logits = self.slots.read(slot)
            except Exception as error:
                self._fail(job, error)
            else:
                self.tokens_written += 1
                self._finish_texts(self.slots.draw(logits, slot))

    def _finish_texts(self, ended: list[int]) -> None:
        """Free the slots of texts that have ended or failed; the highest comes first."""
        failed = []
        for slot in ended:
            text = self.slots.texts[slot]
            job = self._writing[text]
            if text.error is not None:
                failed.append((job, text.error))
                continue
            if job.keep_state:
                job.state = self.slots.states[:, slot : slot + 1].clone()
            self._free(slot)
            job.unfinished -= 1
            if not job.unfinished:
                self._end(job)
        for job, error in failed:
            self._fail(job, error)

    def _report(self) -> None:
        now = time.perf_counter()
        if now >= self._next_tick and self._writing:
            streams = dict.fromkeys(job for job in self._writing.values() if job.stream)
            self._progress += streams
            self._next_tick = now + max(TICK_SECONDS, len(streams) / EVENTS_PER_SECOND)
        if self._progress:
            self.notify(self._progress)
            self._progress = []
