"""A server under load, against decoding alone."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch

from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder
from mhesa.inference.sampling import BatchSampler, Sampling, TokenSampler
from mhesa.model.loading import load

STREAMS = (1, 16, 128, 1000)
# Tokens of one measurement in all: at most, and the number at which a client stops asking for further texts.
TOKENS, ENOUGH = 400_000, 100_000
WRITTEN = re.compile(rb'"completion_tokens":(\d+)')
PROMPT = "The quick brown fox"


@dataclass(frozen=True)
class Row:
    """Figures for one number of streams; times in milliseconds.

    Args:
        streams: clients at the same time; each opens a connection for each text.
        texts: number of texts requested in all; a client asks for one after another.
        tokens: tokens of each text.
        finished: number of texts that were received whole.
        requests_per_second, tokens_per_second: rates over the whole run.
        of_steps: tokens a second over those of the decoder's steps alone.
        of_loop: tokens a second over those of a loop of steps and sampling.
        first_token: time from the request to the first token.
        per_token: a stream's mean time from one token to the next.
        pause: time between two events of a stream, each of which may bring several tokens.
        health: time of the answers of `/health` under the load.
    """

    streams: int
    texts: int
    tokens: int
    finished: int
    requests_per_second: float
    tokens_per_second: float
    of_steps: float
    of_loop: float
    first_token: Quantiles
    per_token: Quantiles
    pause: Quantiles
    health: Quantiles


@dataclass(frozen=True)
class Quantiles:
    """The median and the 99th percentile."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles:
        """Quantiles in milliseconds of times in seconds."""
        ordered = sorted(seconds) or [float("nan")]
        return cls(1000 * statistics.median(ordered), 1000 * ordered[int(0.99 * (len(ordered) - 1) + 0.5)])


@dataclass
class _Stream(asyncio.Protocol):
    """One streamed completion, read with little work, because the client takes time from the server."""

    body: bytes
    host: str
    done: asyncio.Future[None]
    started: float = 0.0
    events: list[tuple[float, int]] = field(default_factory=list)
    finished: bool = False
    rest: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.started = time.perf_counter()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        )
        transport.write(head.encode() + self.body)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        counts = WRITTEN.findall(self.rest + data)
        if counts:
            self.events.append((now, int(counts[-1])))
        # Two reads may cut a count in two.
        self.rest = data[-32:] if not data.endswith(b"\n") else b""
        self.finished = self.finished or b"[DONE]" in data

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def bench_serve(
    folder: Path, streams: Sequence[int] = STREAMS, quantize: str | None = None, tokens: int | None = None
) -> Iterator[Row]:
    """Start a server for a model, request many texts at once, and compare with decoding alone.

    Server and clients share this machine. Decoding is timed while the server is idle, before and after each
    measurement, with the same sampling.

    Args:
        folder: a trained model.
        streams: numbers of concurrent streams, one for each measurement.
        quantize: how the decoder stores weights.
        tokens: tokens of each text; enough for some seconds if omitted.
    """
    model, _ = load(folder)
    decoder = Decoder(model, max_batch=max(streams), quantize=quantize)
    arguments = ["--slots", str(max(streams))] + (["--quantize", quantize] if quantize else [])
    with running(folder, arguments) as url:
        asyncio.run(_load(url, 1, 50))
        for count in streams:
            length = tokens or max(100, min(4000, TOKENS // count))
            before = decoding_rates(decoder, count)
            run = asyncio.run(_load(url, count, length))
            after = decoding_rates(decoder, count)
            yield _row(run, count, length, [(a + b) / 2 for a, b in zip(before, after, strict=True)])


def decoding_rates(decoder: Decoder, batch: int) -> tuple[float, float]:
    """Tokens a second of steps alone, and of a loop that samples after each step."""
    return _rate(decoder, batch, False), _rate(decoder, batch, True)


@torch.inference_mode()
def _rate(decoder: Decoder, batch: int, drawing: bool) -> float:
    state = decoder.initial_state(batch)
    samplers = BatchSampler(decoder.num_tokens, [TokenSampler(Sampling(), seed) for seed in range(batch)])

    def advance() -> None:
        logits = decoder.step(samplers.last, state)
        if drawing:
            samplers.draw(logits)

    # Not timed: compilation, and threads that wake up.
    for _ in range(3):
        advance()
    steps, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < 1:
        advance()
        steps += 1
    return batch * steps / passed


@contextmanager
def running(folder: Path, arguments: Sequence[str] = ()) -> Iterator[str]:
    """Run a server in a process of its own on a free port, and give its URL.

    Raises:
        InputError: it does not start; the message is what it wrote to standard error.
    """
    command = [sys.executable, "-m", "mhesa", "serve", str(folder), "--port", "0", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        line = process.stderr.readline()
        if '"listening"' not in line:
            raise InputError(f"the server does not start: {line}{process.stderr.read()}".strip())
        # Drain its log: a full pipe would stop it.
        copy = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
        try:
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(60)
            copy.wait(60)


@dataclass(frozen=True)
class _Run:
    seconds: float
    streams: list[_Stream]
    health: list[float]


async def _load(url: str, count: int, tokens: int) -> _Run:
    loop = asyncio.get_running_loop()
    address = urlsplit(url)
    streams: list[_Stream] = []
    started = time.perf_counter()
    host, port = str(address.hostname), address.port or 80
    health: list[float] = []
    watch = loop.create_task(_watch(host, port, health))

    async def ask(seed: int) -> None:
        body = {
            "prompt": PROMPT,
            "max_tokens": tokens,
            "seed": seed,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        stream = _Stream(json.dumps(body).encode(), address.netloc, loop.create_future())
        streams.append(stream)
        await loop.create_connection(lambda: stream, host, port)
        await stream.done

    async def client(first: int) -> None:
        for index in range(max(1, min(10, ENOUGH // (count * tokens)))):
            await ask(first + index * count)

    await asyncio.gather(*(client(first) for first in range(count)))
    seconds = time.perf_counter() - started
    watch.cancel()
    with suppress(asyncio.CancelledError):
        await watch
    return _Run(seconds, streams, health)


async def _watch(host: str, port: int, health: list[float]) -> None:
    """Request `/health` every 50 ms and record how long each answer takes."""
    while True:
        started = time.perf_counter()
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        await reader.read()
        writer.close()
        health.append(time.perf_counter() - started)
        await asyncio.sleep(0.05)


def _row(run: _Run, count: int, tokens: int, rates: Sequence[float]) -> Row:
    # A text may be empty: the first token may end it.
    streams = [stream for stream in run.streams if stream.events and stream.events[-1][1]]
    written = sum(stream.events[-1][1] for stream in streams)
    firsts = [next(at for at, number in stream.events if number) - stream.started for stream in streams]
    paces = [
        (stream.events[-1][0] - stream.events[0][0]) / max(1, stream.events[-1][1] - stream.events[0][1])
        for stream in streams
    ]
    pauses = [
        later[0] - earlier[0]
        for stream in streams
        for earlier, later in zip(stream.events, stream.events[1:], strict=False)
    ]
    finished = sum(stream.finished for stream in run.streams)
    return Row(
        streams=count,
        texts=len(run.streams),
        tokens=tokens,
        finished=finished,
        requests_per_second=finished / run.seconds,
        tokens_per_second=written / run.seconds,
        of_steps=written / run.seconds / rates[0],
        of_loop=written / run.seconds / rates[1],
        first_token=Quantiles.of(firsts),
        per_token=Quantiles.of(paces),
        pause=Quantiles.of(pauses),
        health=Quantiles.of(run.health),
    )
