"""Notices that other programs keep the cores busy that training computes on."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import torch

# Seconds between two looks.
INTERVAL = 10.0
# Seconds that the threads of a run, all together, wait for cores in a second: close to none on free cores,
# a half and more beside one program that computes.
WAITING = 0.25
HINT = (
    "Other programs keep this machine's cores busy, and training waits for them. It would wait less with "
    "GOMP_SPINCOUNT=1000 in the environment: stop it, set that, and go on with --resume."
)


class BusyCores:
    """Looks every ten seconds whether the threads of this process wait for cores, and says so once.

    GNU's OpenMP lets a thread that waits for the others spin on its core, which keeps the one that is waited
    for from it. There is nothing to say where threads do not wait for each other, or the user chose how.
    """

    def __init__(self, device: str) -> None:
        chosen = not os.environ.keys().isdisjoint({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
        self._silent = chosen or device != "cpu" or torch.get_num_threads() == 1
        self._looked, self._waited = time.monotonic(), _seconds_waited()

    def hint(self) -> str | None:
        """What to tell the user, if there is anything."""
        now = time.monotonic()
        if self._silent or now - self._looked < INTERVAL:
            return None
        waited = _seconds_waited()
        share = (waited - self._waited) / (now - self._looked)
        self._looked, self._waited = now, waited
        self._silent = share > WAITING
        return HINT if self._silent else None


def _seconds_waited() -> float:
    """How long all threads of this process have been ready to run, and had no core; 0 if not on Linux."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*"):
        with suppress(OSError, IndexError):  # it has ended, or the kernel does not count
            nanoseconds += int((thread / "schedstat").read_text().split()[1])
    return nanoseconds / 1e9
