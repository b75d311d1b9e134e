"""Atomic writes, a check that no output is an input, and JSON files.

After a crash or a power cut, a file or folder is complete or absent: everything is written under a temporary
name, synced to the disk and then renamed, which is atomic.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mhesa.errors import InputError, reason

CHUNK = 1 << 20
PARTIAL = ".partial"


@contextmanager
def write_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears at `path` if the context ends without an exception.

    If `path` is a link, the file that it points to is replaced.

    Raises:
        InputError: `path` exists and is not a file.
    """
    check_file(path)
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


def check_file(path: Path) -> None:
    """Raise `InputError` if there is something at `path` that is no plain file."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a folder, a device or a pipe; give a file")


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there.

    Raises:
        InputError: there is something else.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder")
    path.mkdir(parents=True, exist_ok=True)


def check_outputs(outputs: Iterable[Path | int], inputs: Iterable[Path | int]) -> None:
    """Make sure that outputs are plain files, and that none of them is an input.

    Args:
        outputs: paths, or descriptors of open files, which may also be terminals or pipes.
        inputs: paths or descriptors as well; those that are not there are left out.

    Raises:
        InputError: an output is also an input: the write would destroy it, or the read would not end.
    """
    read = {_identity(one) for one in inputs} - {None}
    for output in outputs:
        if isinstance(output, Path):
            check_file(output)
        if _identity(output) in read:
            name = "standard output" if isinstance(output, int) else output
            raise InputError(f"{name} is also an input; choose another output")


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Device and inode, which all names of a plain file have in common; `None` if there is no such file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def read_json(path: Path, missing: str = "") -> Any:
    """The values in a JSON file.

    Args:
        path: the file.
        missing: message of the error if there is no such file.

    Raises:
        InputError: it cannot be read, is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise InputError(f"{path} is damaged: it is nested too deeply") from error
    except OSError as error:
        message = missing if isinstance(error, FileNotFoundError) else ""
        raise InputError(message or f"cannot read {path}: {reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error


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


def read_chunks(path: Path, start: int = 0, size: int = sys.maxsize) -> Iterator[memoryview]:
    """The bytes of a file from `start` on, at most `size`; the next chunk overwrites the one before it."""
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer[:size]):
            yield buffer[:count]
            size -= count


def sha256(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()
