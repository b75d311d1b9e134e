"""File locks: one writer at a time, and one process that makes a shared file."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mhesa.atomic_io import check_file, make_folder
from mhesa.errors import InputError, os_errors

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
# Largest size of a lock file's text, in bytes. The text names the holder.
HOLDER_BYTES = 300
# Seconds to wait, at most, for another process to make something.
WAIT_SECONDS = 60


@contextmanager
def only_writer_of_file(path: Path) -> Iterator[None]:
    """Be the only one that writes a file; see `only_writer_of_folder`."""
    check_file(path)
    path = Path(os.path.realpath(path))
    with _locked(path.with_name(f".{path.name}{LOCK}"), path):
        yield


@contextmanager
def only_writer_of_folder(folder: Path) -> Iterator[None]:
    """Be the only one, among processes and threads that call this, that writes into a folder.

    A folder that is not there is made, and removed if it is still empty at the end. The lock is a file that
    says who holds it; the system frees it when the process ends, however it ends.

    Raises:
        InputError: somebody else is writing; or the lock cannot be made.
    """
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    with os_errors(f"cannot write to {folder}"):
        make_folder(folder)
    try:
        with _locked(folder / LOCK, folder):
            yield
    finally:
        with suppress(OSError):
            for one in made:
                one.rmdir()


@contextmanager
def made_once(marker: Path) -> Iterator[None]:
    """Let one of several processes make something that all need.

    The others wait, a minute at most, and then find it made. If it fails or dies, the next one makes it.
    Where no marker can be written or locked, each makes its own.

    Args:
        marker: a file, empty until the thing is made.
    """
    descriptor = None
    with suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    if descriptor is None:
        yield
        return
    try:
        with suppress(OSError):  # the file system has no locks
            _wait_until_made(descriptor)
        yield
        with suppress(OSError):  # no space is left
            if not os.fstat(descriptor).st_size:
                os.write(descriptor, b"made")
    finally:
        os.close(descriptor)


def _wait_until_made(marker: int) -> None:
    """Return as soon as it is made, nobody else makes it, or the time is over."""
    until = time.monotonic() + WAIT_SECONDS
    while not (os.fstat(marker).st_size or _try_lock(marker)) and time.monotonic() < until:
        time.sleep(0.02)


@contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    with os_errors(f"cannot write to {what}", f" ({lock})"):
        descriptor = _open_locked(lock, what)
    try:
        with os_errors(f"cannot write to {what}", f" ({lock})"):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        # Removed while it is locked: who has opened it meanwhile sees that it is gone, and makes another.
        with suppress(OSError):  # Windows does not remove open files
            lock.unlink()
        os.close(descriptor)


def _open_locked(lock: Path, what: Path) -> int:
    """The descriptor of a lock's file, locked."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _try_lock(descriptor):
                holder = os.read(descriptor, HOLDER_BYTES).decode("utf-8", "replace") or "another process"
                raise InputError(f"{what} is being written by {holder}; wait for it, or write to another")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file, unless it is locked."""
    try:
        if sys.platform == "win32":
            # A byte behind the content, which others have to read.
            os.lseek(descriptor, HOLDER_BYTES, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.lseek(descriptor, 0, os.SEEK_SET)
    return True
