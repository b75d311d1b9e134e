"""The server's process: sockets, time limits of connections, signals."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mhesa.errors import os_errors
from mhesa.ops.cpu.memory import share_heaps
from mhesa.serve.api.app import create_app
from mhesa.serve.api.errors import APIError
from mhesa.serve.api.service import Service
from mhesa.serve.http.guard import DRAIN_SECONDS, protect
from mhesa.serve.logs import log, redirect_logger
from mhesa.serve.sessions import SessionError
from mhesa.serve.settings import Limits

# How long a thread may keep Python's global lock when another waits for it: the decode thread needs it
# after every step. Python's default is 5 ms.
SWITCH_SECONDS = 0.0001
# New objects after which garbage is collected; Python's default is 700.
COLLECT_AFTER = 50_000
# How long a connection may be idle: longer than the pools of clients (15 to 90 s) keep one, so that they do
# not write into a connection that the server is closing.
KEEP_ALIVE_SECONDS = 120
# Time between two deletions of expired sessions.
EXPIRE_SECONDS = 600
# Time between two releases of memory that requests have used.
RELEASE_SECONDS = 1
# Time between two looks at the decode thread.
WATCH_SECONDS = 0.5


def serve(service: Service) -> None:
    """Serve until SIGTERM or SIGINT, or until the decode thread fails; answers that have begun may finish.

    It changes settings of the whole process: the thread switch interval, garbage collection, the heaps of
    the C library, the limit of open files, uvicorn's log.

    Raises:
        InputError: the address cannot be listened on.
        RuntimeError: the decode thread failed.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    # A garbage collection stops all threads. Leave out the objects that live as long as the server, and
    # collect less often, so that a request that makes many objects does not delay the others.
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)
    share_heaps()
    _raise_file_limit()
    redirect_logger("uvicorn.error", logging.ERROR)
    settings = service.settings
    config = uvicorn.Config(
        protect(create_app(service), service),
        host=settings.host,
        port=settings.port,
        http=_protocol(settings.limits),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.limits.drain_seconds) + 5,
    )
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with os_errors(f"cannot listen on {settings.host}:{settings.port}"):
        bound.bind((settings.host, settings.port))
    try:
        _Server(config, service).run(sockets=[bound])
    finally:
        service.close()
    log("stopped")
    if service.engine.failure is not None:
        raise RuntimeError("the decode thread failed") from service.engine.failure


class _Server(uvicorn.Server):
    """Uvicorn with our own signals: answers finish first, and then the process ends with exit code 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service
        # Whether a second signal has come.
        self._hurried = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, loop)
        tasks = (self._expire_sessions(), self._release_memory(), self._stop_after_failure())
        housekeeping = [loop.create_task(task) for task in tasks]
        try:
            yield
        finally:
            for task in housekeeping:
                task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log("listening", url=url, model=self.service.settings.name)

    def _stop(self, loop: asyncio.AbstractEventLoop) -> None:
        service = self.service
        if self.should_exit:
            # Requests still running end with an error now; the third signal does not wait for their answers.
            self.force_exit, self._hurried = self._hurried, True
            service.engine.stop()
            return
        service.stopping = self.should_exit = True
        # Requests still running then end with an error.
        loop.call_later(service.settings.limits.drain_seconds, service.engine.stop)
        log("stopping", active=service.engine.active, waiting=service.engine.waiting)

    async def _expire_sessions(self) -> None:
        while True:
            # `Sessions` has noted in the log why it cannot be used; the next time it may be.
            with suppress(SessionError):
                if expired := await self.service.run_in_disk_thread(self.service.sessions.expire):
                    log("expired", sessions=expired)
            await asyncio.sleep(EXPIRE_SECONDS)

    async def _release_memory(self) -> None:
        while True:
            await self.service.release_memory()
            await asyncio.sleep(RELEASE_SECONDS)

    async def _stop_after_failure(self) -> None:
        """End the server when its decode thread has failed, for a supervisor to start another."""
        while self.service.engine.failure is None:
            await asyncio.sleep(WATCH_SECONDS)
        self.service.stopping = self.should_exit = True


def _protocol(limits: Limits) -> type[HttpToolsProtocol]:
    """HTTP/1.1 that closes connections of clients that send or read too slowly."""

    class Protocol(HttpToolsProtocol):
        _complete = False
        _refused = False
        # Bytes of the request's line and headers so far; `None` once they are complete.
        _head: int | None = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._timers: dict[str, asyncio.TimerHandle] = {}
            self._start_timer("receive", limits.receive_seconds)

        def data_received(self, data: bytes) -> None:
            # Line ends before a request are no part of it, and must not make an idle connection look busy.
            if self._refused or (self._complete and not data.strip(b"\r\n")):
                return
            if self._head is not None:
                self._head += len(data)
            super().data_received(data)
            if self._complete:
                self._stop_timer("receive")
            elif "receive" not in self._timers:
                self._start_timer("receive", limits.receive_seconds)
            if self._head is not None and self._head > limits.head_bytes:
                self._refuse_head()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._complete = False

        def on_headers_complete(self) -> None:
            self._head = None
            if (
                len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
                > limits.head_bytes
            ):
                self._refuse_head()
                raise ValueError  # which ends the parser's call
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._complete, self._head = True, 0

        def pause_writing(self) -> None:
            super().pause_writing()
            self._start_timer("send", limits.send_seconds)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_timer("send")

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer("receive")
            self.resume_writing()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is not a valid HTTP request", "invalid_http")

        def _refuse_head(self) -> None:
            self._refuse(431, "the request's headers are too large", "headers_too_large")

        def _refuse(self, status: int, message: str, code: str) -> None:
            if self._refused:
                return
            self._refused = True
            self._stop_timer("receive")
            log("refused", status=status, code=code)
            body = bytes(APIError(status, message, code=code).response().body)
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            if self.cycle is not None and not self.cycle.response_complete:
                # An earlier request is being answered, which goes on writing.
                self.transport.close()
                return
            # Drain the socket: closing it with unread bytes sends a reset, and the client loses the answer.
            self.transport.write_eof()
            self.loop.call_later(DRAIN_SECONDS, self.transport.close)

        def _start_timer(self, name: str, seconds: float) -> None:
            # A refused request has DRAIN_SECONDS to come; a client that does not read is still cut off.
            if name == "send" or not self._refused:
                self._timers[name] = self.loop.call_later(seconds, self._cut, name)

        def _cut(self, name: str) -> None:
            # A connection on which nothing was ever sent is not worth a line.
            if name == "send" or self._head != 0:
                log("cut", code="answer_not_read" if name == "send" else "slow_request")
            self.transport.abort()

        def _stop_timer(self, name: str) -> None:
            if name in self._timers:
                self._timers.pop(name).cancel()

    return Protocol


def _raise_file_limit() -> None:
    """Raise the limit of open files to what the system allows: each connection is one."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS says that there is no limit, and allows some
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
