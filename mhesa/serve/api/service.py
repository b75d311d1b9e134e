"""A model being served: what the routes share."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.requests import Request

from mhesa.inference.decoder import Decoder
from mhesa.inference.session import fingerprint, token_bytes
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.cpu.memory import release_memory
from mhesa.serve.api.errors import APIError, invalid, stopping
from mhesa.serve.api.metrics import Metrics
from mhesa.serve.engine.decode_thread import DecodeThread
from mhesa.serve.engine.jobs import Busy, Job, Stopped, wake
from mhesa.serve.sessions import Sessions
from mhesa.serve.settings import Settings
from mhesa.tokenizers import Bytes, TextTokenizer
from mhesa.tokenizers.stream import encode_stream

T = TypeVar("T")
# Work on fewer bytes or tokens than this is done on the event loop.
SMALL = 1 << 13
# Bytes of a text that are tokenised at once.
PIECE = 1 << 16


class Service:
    """A model with its decode thread and its sessions.

    Args:
        model, tokenizer: model to serve, and its tokenizer.
        settings: settings of the server.
        quantize: how weights are stored, see `Decoder`.
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
        self.id_type = np.dtype(np.uint16 if len(self.token_bytes) <= 1 << 16 else np.int32)
        self.special_tokens = tokenizer.special_tokens()
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
            notify=self._notify,
        )
        self.metrics = Metrics(self.engine, self.sessions)
        self.stopping = False
        self.sessions_in_use: set[tuple[str, str]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sessions")
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="worker")
        # Whether there is memory to release: large work has been done, or an answer was given up.
        self.has_grown = False

    def close(self) -> None:
        """End the threads and close the files."""
        self.engine.close()
        self._workers.shutdown()
        self._disk.shutdown()
        self.sessions.close()

    async def run_in_disk_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function that may wait for the disk, in a thread for that."""
        return await asyncio.get_running_loop().run_in_executor(self._disk, function, *args)

    async def run_sized(self, size: int, function: Callable[..., T], *args: Any) -> T:
        """Call a function whose work grows with `size`: at once if that is small, else in a worker thread.

        The event loop then goes on with other requests.
        """
        if size < SMALL:
            return function(*args)
        self.has_grown = True
        return await asyncio.get_running_loop().run_in_executor(self._workers, function, *args)

    async def release_memory(self) -> None:
        """Give memory back to the system if there may be some."""
        if self.has_grown:
            self.has_grown = False
            await asyncio.get_running_loop().run_in_executor(self._workers, _release_memory)

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

    def _notify(self, jobs: list[Job]) -> None:
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
            return self._encode_text(utf8(prompt, param))
        self.check_token(max(prompt, default=0), param)
        return np.array(prompt, dtype=self.id_type)

    def _encode_text(self, text: bytes) -> np.ndarray:
        """The tokens of a text; a long one in pieces, which takes little memory."""
        if len(text) <= PIECE or isinstance(self.tokenizer, Bytes):
            return self.tokenizer.encode_bytes(text).astype(self.id_type)
        pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
        blocks = encode_stream(self.tokenizer, self.token_bytes, pieces)
        parts = [np.concatenate([block.ids for block in together]) for together in blocks]
        return np.concatenate(parts, dtype=self.id_type, casting="same_kind")

    def decode(self, ids: np.ndarray) -> bytes:
        """The bytes of tokens, `(tokens,)`; special tokens have none."""
        # In pieces: `join` needs 80 bytes for each of its parts.
        starts = range(0, len(ids), PIECE)
        pieces = (map(self.token_bytes.__getitem__, ids[start : start + PIECE].tolist()) for start in starts)
        return b"".join(map(b"".join, pieces))

    def token_name(self, token: int) -> str:
        """A token as text; escaped where its bytes are not whole characters."""
        piece = self.special_tokens.get(token, "").encode() or self.token_bytes[token]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _release_memory() -> None:
    # Errors and their tracebacks refer to one another, and to the request.
    gc.collect()
    release_memory()


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
