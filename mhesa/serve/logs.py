"""Logs: one JSON object a line on standard error; never a prompt, a text or a key."""

from __future__ import annotations

import json
import logging
import sys
import time


def log(event: str, **fields: object) -> None:
    """Write a line of ASCII, whatever the fields hold."""
    line = {"time": round(time.time(), 3), "event": event, **fields}
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()


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
