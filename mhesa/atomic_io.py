"""Files and folders that are whole or not there, whatever ends the process or the power.

Everything is written under another name, synced to the disk and renamed: the only step that others can
see is the rename, and that is one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

CHUNK = 1 << 20
PARTIAL = ".partial"


@contextmanager
def write_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that takes its place when the context ends well, and leaves nothing otherwise."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def write_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that takes its place when the context ends well, and leaves nothing otherwise.

    What is at `path` already, or was left half written by a process that died, is replaced.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        readers = partial.stat().st_mode & 0o666
        for file in sorted(partial.iterdir()):
            # Some libraries write files that only their owner may read.
            file.chmod(readers)
            sync(file)
        sync(partial)
        remove(path)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        remove(partial)
        raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a folder and all below it, or a file, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The digest of a file, in memory that does not grow with it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
