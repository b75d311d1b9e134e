"""Before every route: access control, limits of bodies, a line in the log."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import time
import traceback
import uuid
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mhesa.serve.api.errors import APIError, disconnected, stopping
from mhesa.serve.api.service import Service
from mhesa.serve.logs import log
from mhesa.serve.settings import is_loopback

# Routes that need no key.
OPEN = frozenset({"/health"})
# A client that is still sending a body above the limit does not read the answer: let it send up to
# DRAINED_BODIES times the limit, for up to DRAIN_SECONDS.
DRAINED_BODIES = 16
DRAIN_SECONDS = 2.0
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
CHALLENGE = {"WWW-Authenticate": 'Basic realm="mhesa: any name, and an API key for the password"'}


def protect(app: ASGIApp, service: Service) -> ASGIApp:
    """The application behind a `Guard`, and usable by web pages of the origins that the settings allow."""
    guard, origins = Guard(app, service), service.settings.allow_origins
    if not origins:
        return guard
    # Outside of the guard, which asks for a key: a browser sends a CORS preflight request without one.
    return CORSMiddleware(
        guard,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "retry-after"),
    )


class Guard:
    """Wraps the application.

    It asks for a key on every path but `/health`, unknown ones too, and reads the whole body, up to the
    limit, before the application gets the request.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.keys = {name: _digest(key.encode()) for name, key in service.settings.keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        started = time.perf_counter()
        request_id = uuid.uuid4().hex
        # What routes see as `request.state`: the client's name, the body, and what they add to the line in
        # the log.
        fields: dict[str, Any] = {}
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["log_fields"] = fields
        method, status = scope["method"], 0
        if method == "HEAD":
            # Routes know GET; of their answers uvicorn sends only the head.
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), *HEADERS]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        try:
            headers = dict(scope["headers"])
            state["client"] = self._admit(scope, headers)
            state["body"] = await self._body(headers, receive)
            await self.app(scope, receive, answer)
        except APIError as error:
            most = DRAINED_BODIES * self.service.settings.limits.body_bytes
            sender = _drain_before_end(receive, answer, most) if error.status == 413 else answer
            await error.response()(scope, receive, sender)
        except Exception:
            log("fault", id=request_id, error=traceback.format_exc())
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "none")
            self.service.metrics.requests.labels(route, str(status)).inc()
            self.service.metrics.seconds.labels(route).observe(seconds)
            if route not in OPEN:
                log(
                    "request",
                    id=request_id,
                    client=state.get("client"),
                    method=method[:16],
                    route=route,
                    status=status,
                    ms=round(seconds * 1000, 1),
                    **fields,
                )

    def _admit(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """The client's name; raises `APIError` if it has no access."""
        if scope["path"] in OPEN:
            return ""
        _check_origin(headers, self.service.settings.allow_origins)
        if self.keys:
            client = self._client(headers.get(b"authorization", b""))
        else:
            _check_host(headers.get(b"host", b""))
            client = ""
        if self.service.stopping:
            raise stopping()
        return client

    def _client(self, authorization: bytes) -> str:
        given = _digest(_key(authorization))
        # Compare with every key, in constant time: how long it takes says nothing about the keys.
        found = [name for name, digest in self.keys.items() if hmac.compare_digest(given, digest)]
        if not found:
            raise APIError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers=CHALLENGE,
            )
        return found[0]

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        limit = self.service.settings.limits.body_bytes
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > limit:
            raise _too_large(limit)
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise disconnected()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise _too_large(limit)
        return bytes(body)


def _drain_before_end(receive: Receive, send: Send, most: int) -> Send:
    """Send an answer, but end it only when the client has sent its body, or `most` bytes more of it."""

    async def drain() -> None:
        left, more = most, True
        while more and left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            more = message.get("more_body", False)

    async def answer(message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last:
            await send({**message, "more_body": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(drain(), DRAIN_SECONDS)
            message = {"type": "http.response.body"}
        await send(message)

    return answer


def _too_large(limit: int) -> APIError:
    return APIError(
        413,
        f"the body may have at most {limit:,} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )


def _check_origin(headers: dict[bytes, bytes], allowed: Sequence[str]) -> None:
    """Refuse what a browser sends for a page of another origin, unless that is allowed.

    A browser sends simple requests without asking first, and a user's password with them.
    """
    origin = headers.get(b"origin", b"").decode("latin-1")
    own = origin.partition("://")[2] == headers.get(b"host", b"").decode("latin-1")
    if origin and not own and "*" not in allowed and origin not in allowed:
        message = f"pages of {origin[:200]} may not use this server; its --allow-origin can allow them"
        raise APIError(403, message, code="origin_not_allowed")


def _check_host(header: bytes) -> None:
    """Refuse host names that another site may have pointed at this machine (DNS rebinding)."""
    host = header.decode("latin-1")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name.lower()):
        raise APIError(
            403, "without API keys this server answers requests to localhost only", code="host_not_allowed"
        )


def _key(authorization: bytes) -> bytes:
    """The key of an Authorization header: Bearer, or the password of Basic with any user."""
    kind, _, value = authorization.strip().partition(b" ")
    if kind.lower() == b"bearer":
        return value.strip()
    if kind.lower() == b"basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
