"""One JSON object a line on standard error: never a prompt, a text or a key."""

from __future__ import annotations

import json
import logging
import sys
import time


def log(event: str, **fields: object) -> None:
    """Write a line; whatever the fields hold, it stays one line of ASCII."""
    line = {"time": round(time.time(), 3), "event": event, **fields}
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()


class Lines(logging.Handler):
    """What libraries log, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        fields: dict[str, object] = {"level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["error"] = logging.Formatter().formatException(record.exc_info)
        log(record.name, **fields)


def catch(name: str, level: int) -> None:
    """Write what the library `name` logs from `level` on."""
    logger = logging.getLogger(name)
    logger.handlers, logger.propagate = [Lines()], False
    logger.setLevel(level)
