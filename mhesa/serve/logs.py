"""Logs: one JSON object a line on standard error; never a prompt, a text or a key."""

from __future__ import annotations

import json
import logging
import select
import sys
import time
from io import UnsupportedOperation

# Characters of a field: the end of a longer one is written. A line is then shorter than what a pipe takes at
# once.
FIELD = 2000
_dropped = 0


def log(event: str, **fields: object) -> None:
    """Write a line of ASCII, whatever the fields hold.

    It never raises and never waits: a line that standard error does not take is dropped, and the next one
    that it takes counts those before it in `dropped`.
    """
    global _dropped
    if sys.stderr is None:
        return
    line = {"time": round(time.time(), 3), "event": event, **fields}
    if _dropped:
        line["dropped"] = _dropped
    short = {name: value[-FIELD:] if isinstance(value, str) else value for name, value in line.items()}
    try:
        if _is_blocked():
            raise BlockingIOError
        sys.stderr.write(json.dumps(short, default=str) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        # A pipe whose reader is gone or does not read, a full disk, a closed file.
        _dropped += 1
    else:
        _dropped = 0


def _is_blocked() -> bool:
    """Whether writing to standard error would wait: it is a pipe that nobody reads."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stderr, select.POLLOUT)
    except UnsupportedOperation:
        # It is no file.
        return False
    return not poll.poll(0)


class JSONHandler(logging.Handler):
    """Writes the records of `logging` in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        fields: dict[str, object] = {"level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["error"] = logging.Formatter().formatException(record.exc_info)
        log(record.name, **fields)


def redirect_logger(name: str, level: int) -> None:
    """Write what the logger `name` logs from `level` on in the same form."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [JSONHandler()], False
    logger.setLevel(level)
