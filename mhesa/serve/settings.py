"""What a server is told, and what it puts up with."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from mhesa.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how long anything may take.

    Args:
        body: bytes of a request's body.
        head: bytes of a request's line and headers.
        prompt: tokens of all its prompts.
        tokens: tokens of each text.
        texts: texts in all, prompts times `n`.
        stops, stop: how many stop strings, and bytes of each.
        biases: tokens that a bias is given for.
        logprobs: likeliest tokens beside each.
        scored: tokens that are scored one by one in an answer.
        seconds: from a request's arrival to the end of its answer.
        receive: seconds in which a request must have arrived.
        send: seconds that a client may leave its answer unread.
        drain: seconds that answers are given to finish when the server is told to stop.
        sessions: sessions of one client.
        idle: seconds after which a session that nobody used is forgotten.
    """

    body: int = 1 << 20
    head: int = 1 << 14
    prompt: int = 1 << 20
    tokens: int = 4096
    texts: int = 128
    stops: int = 16
    stop: int = 256
    biases: int = 1024
    logprobs: int = 20
    scored: int = 1 << 16
    seconds: float = 600
    receive: float = 8
    send: float = 30
    drain: float = 20
    sessions: int = 100_000
    idle: float = 7 * 24 * 3600


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Args:
        name: what clients call the model.
        host, port: where to listen; port 0 takes a free one.
        keys: the clients' API keys by the clients' names; without any, everyone on this machine may come.
        sessions: an SQLite file that keeps sessions; `None` keeps them in memory.
        slots: texts that are written at the same time.
        queue: texts that may wait for a slot.
        limits: see `Limits`.

    Raises:
        InputError: a value that cannot be, or a server open to the network without keys.
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
            ("max_tokens", self.limits.tokens, 1),
        ):
            if value < least:
                raise InputError(f"{name} must be at least {least}, not {value}")
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"port must be 0 to 65535, not {self.port}")
        if not 0 < self.limits.seconds < float("inf"):
            raise InputError(f"timeout must be a positive number, not {self.limits.seconds}")
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
    """API keys by their clients' names, from a file with a `name: key` a line; `#` begins a comment.

    Raises:
        InputError: the file cannot be read, or a line of it is of another form; keys are never repeated
            in the message.
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
