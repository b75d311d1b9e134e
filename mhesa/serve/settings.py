"""A server's settings, limits and API keys."""

import ipaddress
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from mhesa.errors import InputError
from mhesa.settings import AT_LEAST_0, AT_LEAST_1, Doc, Range, check_ranges, documented

PORTS = Range("0 to 65535", range(1 << 16).__contains__)
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[a-z0-9.:_\[\]-]+")


@documented
@dataclass(frozen=True)
class Limits:
    """The limits of a request and of a client."""

    body_bytes: Annotated[int, Doc("Bytes of a request's body.")] = 1 << 20
    head_bytes: Annotated[int, Doc("Bytes of a request's line and headers.")] = 1 << 14
    prompt_tokens: Annotated[int, Doc("Tokens of all prompts of a request.")] = 1 << 20
    max_tokens: Annotated[int, Doc("Maximum number of tokens to write for one text.", AT_LEAST_1)] = 4096
    texts: Annotated[int, Doc("Texts of a request: its prompts times n.")] = 128
    stop_strings: Annotated[int, Doc("Stop strings of a request.")] = 16
    stop_bytes: Annotated[int, Doc("Bytes of a stop string.")] = 256
    messages: Annotated[int, Doc("Messages of a conversation.")] = 4096
    logit_biases: Annotated[int, Doc("Tokens in logit_bias.")] = 1024
    logprobs: Annotated[int, Doc("Likeliest tokens to report beside each token.")] = 20
    logprob_entries: Annotated[
        int, Doc("Log-probabilities in one answer: its tokens, times the likeliest tokens and itself.")
    ] = 1 << 18
    scored_tokens: Annotated[
        int,
        Doc("Tokens to score one by one in an answer; those of lines and texts are limited as prompts are."),
    ] = 1 << 16
    request_seconds: Annotated[float, Doc("Seconds from a request's arrival to the end of its answer.")] = 600
    receive_seconds: Annotated[float, Doc("Seconds in which a request must have arrived.")] = 8
    send_seconds: Annotated[float, Doc("Seconds that a client may leave its answer unread.")] = 30
    drain_seconds: Annotated[
        float, Doc("Seconds that running answers get to finish when the server stops.")
    ] = 20
    sessions: Annotated[int, Doc("Sessions of one client.")] = 100_000
    idle_seconds: Annotated[float, Doc("Seconds after which an unused session is deleted.")] = 7 * 24 * 3600


@documented
@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Raises:
        InputError: a value out of range, or a server that other machines can reach without keys.
    """

    name: Annotated[str, Doc("What clients call the model; the folder's name if omitted.")]
    host: Annotated[str, Doc("Address to listen on; one that other machines can reach needs --keys.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Doc("Port to listen on; 0 takes a free one.", PORTS)] = 8000
    keys: Annotated[
        dict[str, str], Doc("API keys by the names of clients; without any, all of this machine may connect.")
    ] = field(default_factory=dict)
    sessions: Annotated[
        Path | None, Doc("SQLite file that keeps sessions; if omitted, they are in memory.", metavar="FILE")
    ] = None
    allow_origins: Annotated[
        tuple[str, ...],
        Doc("Origins of web pages that may use the server, such as https://example.org; * is any."),
    ] = ()
    slots: Annotated[int, Doc("Texts to write at the same time.", AT_LEAST_1)] = 1024
    queue: Annotated[int, Doc("Texts that may wait for a slot.", AT_LEAST_0)] = 1024
    limits: Annotated[Limits, Doc("The limits of a request, see `Limits`.")] = Limits()

    def __post_init__(self) -> None:
        check_ranges(self)
        check_ranges(self.limits)
        if not 0 < self.limits.request_seconds < float("inf"):
            raise InputError(f"timeout must be a positive number, not {self.limits.request_seconds}")
        for origin in self.allow_origins:
            if not ORIGIN.fullmatch(origin):
                raise InputError(f"an origin is https://host, http://host:port or *, not {origin}")
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
