"""Atomic writes: after a crash or a power cut, a file or folder is complete or absent.

Everything is written under a temporary name, synced to the disk and then renamed, which is atomic.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mhesa.errors import InputError

CHUNK = 1 << 20
PARTIAL = ".partial"


@contextmanager
def write_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears at `path` if the context ends without an exception.

    If `path` is a link, the file that it points to is replaced.

    Raises:
        InputError: `path` exists and is not a file.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a folder, a device or a pipe; give a file")
    path = Path(os.path.realpath(path))
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
    """Fill a folder that appears at `path` if the context ends without an exception.

    It replaces a folder at `path`, and what a process that died left half written.
    """
    partial = path.with_name(f".{path.name}{PARTIAL}")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        readers = partial.stat().st_mode & 0o666
        for file in sorted(partial.iterdir()):
            # Some libraries write files that only the owner can read.
            file.chmod(readers)
            sync(file)
        sync(partial)
        remove(path)
        partial.rename(path)
        sync(path.parent)
    except BaseException:
        remove(partial)
        raise


def check_output(output: Path | int, inputs: Iterable[Path | int]) -> None:
    """Make sure that a file to be written is none of those to be read.

    Args:
        output: a path or the descriptor of an open file.
        inputs: likewise.

    Raises:
        InputError: it is one: it would be destroyed, or read without end.
    """
    try:
        written = os.stat(output)
    except OSError:
        return
    if stat.S_ISREG(written.st_mode) and any(os.path.samestat(written, os.stat(one)) for one in inputs):
        name = "standard output" if isinstance(output, int) else output
        raise InputError(f"{name} goes to a file that is to be read; write to another")


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, or a folder and its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
