"""A model being served: what the routes share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from mhesa.inference.decoder import Decoder
from mhesa.inference.session import fingerprint, token_bytes
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.serve.api.errors import APIError, invalid, stopping
from mhesa.serve.api.metrics import Metrics
from mhesa.serve.engine.decode_thread import DecodeThread
from mhesa.serve.engine.jobs import Busy, Job, Stopped, wake
from mhesa.serve.sessions import Sessions
from mhesa.serve.settings import Settings
from mhesa.tokenizers import Bytes, TextTokenizer

T = TypeVar("T")


class Service:
    """A model with its decode thread and its sessions.

    Args:
        model, tokenizer: what to serve.
        settings: how to serve it.
        quantize: see `Decoder`.
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
        # The model's vocabulary may be padded beyond the tokenizer's.
        self.num_tokens = min(len(tokenizer), model.token_emb.num_embeddings)
        self.token_bytes = token_bytes(tokenizer, model.token_emb.num_embeddings)
        self.sessions = Sessions(
            settings.sessions,
            model=fingerprint(model),
            shape=tuple(model.initial_state(1).shape),
            limits=settings.limits,
        )
        self.engine = DecodeThread(
            Decoder(model, max_batch=settings.slots, quantize=quantize, single_thread_small_calls=True),
            num_tokens=self.num_tokens,
            queue=settings.queue,
            tell=self._tell,
        )
        self.metrics = Metrics(self.engine, self.sessions)
        self.stopping = False
        self.sessions_in_use: set[tuple[str, str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sessions")

    def close(self) -> None:
        """End the threads and close the files."""
        self.engine.close()
        self._disk.shutdown()
        self.sessions.close()

    async def run_in_disk_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that may wait for the disk, in a thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue a request's jobs.

        Raises:
            APIError: the queue is full, or the server is shutting down.
        """
        self._loop = asyncio.get_running_loop()
        try:
            self.engine.submit(jobs)
        except Busy as error:
            retry = {"Retry-After": "1"}
            raise APIError(429, str(error), code="rate_limit_exceeded", headers=retry) from error
        except Stopped as error:
            raise stopping() from error

    def _tell(self, jobs: list[Job]) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(wake, jobs)

    def check_model(self, name: str | None) -> None:
        """Raise `APIError` unless `name` is the model that is served, or omitted."""
        if name is not None and name != self.settings.name:
            message = f"there is no such model here; this server has {self.settings.name}"
            raise APIError(404, message, param="model", code="model_not_found")

    def check_token(self, token: int, param: str) -> None:
        """Raise `APIError` if there is no such token."""
        if token >= self.num_tokens:
            raise invalid(f"token ids must be 0 to {self.num_tokens - 1}, not {token}", param)

    def encode(self, prompt: str | list[int], param: str) -> np.ndarray:
        """The ids of a prompt, `(tokens,)`.

        Raises:
            APIError: an id that is not in the vocabulary.
        """
        if isinstance(prompt, str):
            return self.tokenizer.encode_bytes(utf8(prompt, param))
        self.check_token(max(prompt, default=0), param)
        return np.array(prompt, dtype=np.uint16 if len(self.token_bytes) <= 1 << 16 else np.int32)


def utf8(text: str, param: str) -> bytes:
    """A text's bytes.

    Raises:
        APIError: JSON can hold lone surrogates, UTF-8 cannot.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{param} holds a lone surrogate, which is no text", param) from error


def prepend(token: int, ids: np.ndarray) -> np.ndarray:
    """A token before others, `(1 + tokens,)`."""
    return np.concatenate([np.array([token], ids.dtype), ids])


def queue_of(request: Request) -> str:
    """Who takes turns in the queue: the client, or without keys its address."""
    name: str = request.state.client
    return name or (request.client.host if request.client else "")
