"""Standard input, chunk by chunk as it arrives."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator

from mhesa.errors import InputError

CHUNK_BYTES = 1 << 16
# Python handles a signal between two of its own instructions: one that arrives just before a blocking read is
# handled when the read returns, which may be never. So wait with a timeout.
POLL_SECONDS = 0.5


def standard_input() -> Iterator[bytes]:
    """What arrives on standard input, at once; Ctrl-C is handled while nothing arrives.

    Raises:
        InputError: it is closed.
    """
    if sys.stdin is None:
        raise InputError("there is no standard input to read: it is closed")
    return _read(sys.stdin.fileno())


def _read(descriptor: int) -> Iterator[bytes]:
    while True:
        while not select.select([descriptor], [], [], POLL_SECONDS)[0]:
            pass
        chunk = os.read(descriptor, CHUNK_BYTES)
        if not chunk:
            return
        yield chunk
