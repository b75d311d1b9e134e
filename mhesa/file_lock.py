"""Files that one process at a time may use."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from mhesa.errors import InputError


def hold(path: Path) -> FileLock:
    """Lock a file for this process until it ends or calls `release` on the result.

    Beside the file, `path` with `.lock` at its end is locked, and says who holds it.

    Raises:
        InputError: another process holds it, or another part of this one; or it cannot be locked.
    """
    place = Path(f"{os.path.realpath(path)}.lock")
    if not place.parent.is_dir():
        raise InputError(f"cannot lock {path}: there is no folder {path.parent}")
    lock = FileLock(place)
    try:
        # Read before the attempt: older versions of filelock empty the file in it.
        holder = place.read_text("ascii", errors="replace") if place.exists() else ""
        lock.acquire(timeout=0)
        place.write_text(f"process {os.getpid()}", "ascii")
    except Timeout as error:
        raise InputError(f"{path} is in use by {holder or 'another process'}") from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot lock {path}: {reason}") from error
    return lock
