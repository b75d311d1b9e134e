"""Standard input, as it comes."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator

from mhesa.errors import InputError

CHUNK = 1 << 16
# Python sees a signal between two of its own steps: one that comes just before a read begins is seen when the
# read ends, which may be never. A wait that ends by itself, after so many seconds, sees it.
PATIENCE = 0.5


def standard_input() -> Iterator[bytes]:
    """What is written to standard input, as soon as it is; Ctrl-C is heard while there is nothing.

    Raises:
        InputError: it is closed.
    """
    if sys.stdin is None:
        raise InputError("there is no standard input to read: it is closed")
    return _arriving(sys.stdin.fileno())


def _arriving(descriptor: int) -> Iterator[bytes]:
    while True:
        while not select.select([descriptor], [], [], PATIENCE)[0]:
            pass
        chunk = os.read(descriptor, CHUNK)
        if not chunk:
            return
        yield chunk
