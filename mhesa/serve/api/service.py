"""A model being served: what the routes work with."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
from starlette.requests import Request

from mhesa.inference.decoder import Decoder
from mhesa.inference.session import fingerprint
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.serve.api.errors import APIError, busy, stopping
from mhesa.serve.engine.jobs import Busy, Job, Stopped, wake
from mhesa.serve.engine.loop import Engine
from mhesa.serve.engine.text import Vocabulary
from mhesa.serve.http.logs import log
from mhesa.serve.http.metrics import Metrics
from mhesa.serve.sessions import Sessions, Stored
from mhesa.serve.settings import Settings
from mhesa.tokenizers import Bytes, TextTokenizer

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """A model, its decode loop and its sessions.

    Args:
        model, tokenizer: what is served.
        settings: how.
        quantize: how the decoder keeps weights.
    """

    def __init__(
        self,
        model: GatedExponentialSmoothingLM,
        tokenizer: Bytes | TextTokenizer,
        settings: Settings,
        quantize: str | None = None,
    ) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.created = int(time.time())
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.vocabulary = _vocabulary(tokenizer, model.token_emb.num_embeddings)
        limits = settings.limits
        self.sessions = Sessions(
            settings.sessions,
            model=fingerprint(model),
            shape=tuple(model.initial_state(1).shape),
            most=limits.sessions,
            idle=limits.idle,
        )
        self.engine = Engine(
            Decoder(model, max_batch=settings.slots, quantize=quantize, single_thread_small_calls=True),
            settings.slots,
            queue=settings.queue,
            tell=self._tell,
        )
        self.metrics = Metrics(self.engine, self.sessions)
        self.stopping = False
        self.sessions_in_use: set[tuple[str, str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sessions")

    def close(self) -> None:
        """End the threads and let go of files."""
        self.engine.close()
        self._disk.shutdown()
        self.sessions.close()

    async def aside(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run what may wait for the disk, without making others wait."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._disk, lambda: function(*arguments, **named))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue a request's jobs.

        Raises:
            APIError: there is no room, or the server is shutting down.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self.engine.submit(jobs)
        except Busy as error:
            raise busy(str(error)) from error
        except Stopped as error:
            raise stopping() from error

    def _tell(self, jobs: list[Job]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(wake, jobs)


def _vocabulary(tokenizer: Bytes | TextTokenizer, size: int) -> Vocabulary:
    known = min(size, len(tokenizer))
    pieces = [tokenizer.decode_bytes([index]) for index in range(known)]
    return Vocabulary(pieces + [b""] * (size - known), tokenizer.eos_token_id)


class Gone(Exception):  # noqa: N818 not an error of ours
    """The client went away."""


class Run:
    """A request's jobs while they are worked on.

    Whatever happens, `close` must be called: it ends what is not finished.

    Args:
        service: who works.
        request: where a disconnect shows.
        jobs: what to do; they are queued by this.

    Raises:
        APIError: there is no room.
    """

    def __init__(self, service: Service, request: Request, jobs: Sequence[Job]) -> None:
        self.service, self.jobs = service, jobs
        self._request = request
        self._event = asyncio.Event()
        self._gone = self._late = False
        for job in jobs:
            job.wake = self._event.set
        service.submit(jobs)
        loop = asyncio.get_running_loop()
        self._watch = loop.create_task(self._watch_client())
        self._timer = loop.call_later(service.settings.limits.seconds, self._expire)

    async def news(self) -> None:
        """Wait until something happened to the jobs.

        Raises:
            APIError: one failed, or it took too long.
            Gone: the client went away.
        """
        await self._event.wait()
        self._event.clear()
        if self._gone:
            raise Gone
        if self._late:
            raise APIError(504, "this took too long; ask for less", code="timeout")
        for job in self.jobs:
            if isinstance(job.error, Stopped):
                raise stopping()
            if job.error is not None:
                log("fault", error="".join(traceback.format_exception(job.error)))
                raise APIError(500, "the model failed on this request", code="model_failure") from job.error

    async def finish(self) -> None:
        """Wait until all is done; raises as `news` does."""
        while not all(job.done for job in self.jobs):
            await self.news()
        # An error is told at the very end too.
        self._event.set()
        await self.news()

    def close(self) -> None:
        """Stop whatever still runs, and take down figures."""
        self._watch.cancel()
        self._timer.cancel()
        now = time.perf_counter()
        for job in self.jobs:
            if not job.done:
                self.service.engine.cancel(job)
            if job.first_token is None:
                continue
            self.service.metrics.first_token.observe(job.first_token - job.created)
            longest = max(choice.count for choice in job.choices)
            if longest > 1:
                self.service.metrics.per_token.observe((now - job.first_token) / (longest - 1))

    async def _watch_client(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._event.set()

    def _expire(self) -> None:
        self._late = True
        self._event.set()


class Claim:
    """The right to continue a session, held by one request at a time.

    Args:
        service: whose sessions.
        client, name: which.

    Raises:
        APIError: another request holds it.
    """

    def __init__(self, service: Service, client: str, name: str) -> None:
        self.service, self.client, self.name = service, client, name
        self.stored: Stored | None = None
        if (client, name) in service.sessions_in_use:
            raise APIError(
                409,
                f"session {name} is being continued by another request",
                param="session",
                code="session_in_use",
            )
        service.sessions_in_use.add((client, name))

    @property
    def position(self) -> int:
        """Tokens of its text so far."""
        return self.stored.position if self.stored else 0

    async def load(self) -> None:
        """Read what is stored."""
        self.stored = await self.service.aside(self.service.sessions.load, self.client, self.name)

    async def save(self, job: Job, read: int) -> None:
        """Store what became of it after `read` tokens of a prompt."""
        (choice,) = job.choices
        token = int(job.ids[-1]) if choice.last is None else choice.last
        stored = Stored(self.service.engine.state(job), token, self.position + read + choice.drawn)
        await self.service.aside(self.service.sessions.save, self.client, self.name, stored)

    def release(self) -> None:
        """Let others have it."""
        self.service.sessions_in_use.discard((self.client, self.name))


def tokens(service: Service, prompt: str | list[int], param: str = "prompt") -> np.ndarray:
    """The ids of a prompt.

    Raises:
        APIError: an id outside the vocabulary.
    """
    if isinstance(prompt, str):
        return service.tokenizer.encode_bytes(utf8(prompt, param))
    size = len(service.vocabulary.pieces)
    if prompt and max(prompt) >= size:
        raise APIError(
            400, f"token ids must be 0 to {size - 1}, not {max(prompt)}", param=param, code="invalid_value"
        )
    return np.array(prompt, dtype=np.uint16 if size <= 1 << 16 else np.int32)


def utf8(text: str, param: str) -> bytes:
    """A text's bytes.

    Raises:
        APIError: JSON can spell halves of characters, which no UTF-8 can hold.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise APIError(
            400, f"{param} holds a lone surrogate, which is no text", param=param, code="invalid_value"
        ) from error


def facts(request: Request) -> dict[str, Any]:
    """What the log will tell of a request, beside what it tells of all."""
    found: dict[str, Any] = request.scope["state"]["facts"]
    return found


def client(request: Request) -> str:
    """Who sent a request."""
    name: str = request.scope["state"]["client"]
    return name
