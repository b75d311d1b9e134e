"""A server's settings, limits and API keys."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mhesa.errors import InputError


@dataclass(frozen=True)
class Limits:
    """The limits of a request and of a client.

    Args:
        body_bytes: of a request's body.
        head_bytes: of a request's line and headers.
        prompt_tokens: of all prompts of a request.
        max_tokens: of each text.
        texts: in a request: prompts times `n`.
        stop_strings, stop_bytes: how many stop strings, and the length of each.
        logit_biases: tokens with a bias.
        logprobs: likeliest tokens beside each.
        scored_tokens: tokens with a score each in an answer.
        request_seconds: from a request's arrival to the end of its answer.
        receive_seconds: in which a request must have arrived.
        send_seconds: that a client may leave its answer unread.
        drain_seconds: that answers have to finish when the server is told to stop.
        sessions: of a client.
        idle_seconds: after which a session that nobody used is deleted.
    """

    body_bytes: int = 1 << 20
    head_bytes: int = 1 << 14
    prompt_tokens: int = 1 << 20
    max_tokens: int = 4096
    texts: int = 128
    stop_strings: int = 16
    stop_bytes: int = 256
    logit_biases: int = 1024
    logprobs: int = 20
    scored_tokens: int = 1 << 16
    request_seconds: float = 600
    receive_seconds: float = 8
    send_seconds: float = 30
    drain_seconds: float = 20
    sessions: int = 100_000
    idle_seconds: float = 7 * 24 * 3600


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        name: what clients call the model.
        host, port: where to listen; port 0 takes a free one.
        keys: API keys by the names of clients; without keys, everyone on this machine has access.
        sessions: an SQLite file for sessions; `None` keeps them in memory.
        slots: texts that are written at the same time.
        queue: texts that may wait for a slot.
        limits: see `Limits`.

    Raises:
        InputError: a value out of its range, or no keys where other machines can reach the server.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: dict[str, str] = field(default_factory=dict)
    sessions: Path | None = None
    slots: int = 1024
    queue: int = 1024
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        for name, value, least in (
            ("slots", self.slots, 1),
            ("queue", self.queue, 0),
            ("max_tokens", self.limits.max_tokens, 1),
        ):
            if value < least:
                raise InputError(f"{name} must be at least {least}, not {value}")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port must be 0 to 65535, not {self.port}")
        if not 0 < self.limits.request_seconds < float("inf"):
            raise InputError(f"timeout must be a positive number, not {self.limits.request_seconds}")
        if not self.keys and not is_loopback(self.host):
            raise InputError(
                f"{self.host} can be reached from other machines: give --keys FILE, or stay on 127.0.0.1"
            )


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> dict[str, str]:
    """API keys by the names of clients, from a file with a `name: key` in each line; `#` begins a comment.

    Raises:
        InputError: the file cannot be read, or a line has another form; the message never holds a key.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read keys from {path}: {error}") from error
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not (name and colon and len(key) >= 16 and key.isascii() and key.isprintable()):
            raise InputError(
                f"{path}, line {number}: must be a name, a colon and a key of 16 or more ASCII characters"
            )
        if name in keys or key in keys.values():
            raise InputError(f"{path}, line {number}: this name or key is there already")
        keys[name] = key
    if not keys:
        raise InputError(f"{path} holds no key: write a line with a name, a colon and a key")
    return keys
