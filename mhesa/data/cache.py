"""The cache folder, for what is made from a corpus once and used again."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from mhesa.atomic_io import read_chunks, write_folder
from mhesa.data.parallel import map_ordered
from mhesa.errors import InputError, os_errors, reason

CHECKSUMS = "checksums.json"
BLOCK_BYTES = 1 << 26
NAME_ANOTHER = "; name another with MHESA_CACHE"


def cache_folder() -> Path:
    """`MHESA_CACHE`, or `mhesa` in the user's cache folder; made if it is not there.

    Raises:
        InputError: it cannot be made, or there is no such variable and no home folder.
    """
    named, base = os.environ.get("MHESA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(named) if named else Path(base or _home() / ".cache") / "mhesa"
    with os_errors(f"cannot make {folder}", NAME_ANOTHER):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise InputError("there is no home folder to keep tokens in; name one with MHESA_CACHE") from error


def digest(*values: object) -> str:
    """SHA-256 of values that can be written as JSON."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@contextmanager
def lock(name: str) -> Iterator[None]:
    """A context that one process at a time can be in, for each name.

    Raises:
        InputError: the lock cannot be made.
    """
    path = cache_folder() / f"{name}.lock"
    held = FileLock(path)
    try:
        held.acquire()
    except (OSError, NotImplementedError) as error:
        raise InputError(
            f"cannot lock {path}: {reason(error)}; name another folder with MHESA_CACHE"
        ) from error
    try:
        yield
    finally:
        held.release()


def cached_folder(name: str, make: Callable[[Path], object]) -> Path:
    """A folder of the cache, made now unless it is there with every byte as it was written.

    Args:
        name: name of the folder below the cache; changes with everything that its content depends on.
        make: writes the files into the folder it is given.

    Raises:
        InputError: the folder cannot be written.
    """
    folder = cache_folder() / name
    with lock(folder.name), os_errors(f"cannot write to {folder}", NAME_ANOTHER):
        if not _is_whole(folder):
            with write_folder(folder) as partial:
                make(partial)
                (partial / CHECKSUMS).write_text(json.dumps(_checksums(partial)))
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        expected = json.loads((folder / CHECKSUMS).read_bytes())
        return bool(expected == _checksums(folder))
    except (OSError, ValueError, RecursionError):
        return False


def _checksums(folder: Path) -> dict[str, Any]:
    """The size, and the CRC-32 of every block, of each file in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != CHECKSUMS:
            size = path.stat().st_size
            blocks = ((path, start) for start in range(0, size, BLOCK_BYTES))
            found[path.name] = [size, *map_ordered(_crc32, blocks)]
    return found


def _crc32(block: tuple[Path, int]) -> int:
    path, start = block
    checksum = 0
    for chunk in read_chunks(path, start, BLOCK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum


def save_chunks(chunks: Iterable[bytes]) -> Path:
    """Write standard input to a file that is deleted when the process ends: a corpus is read more than once.

    Raises:
        InputError: the file cannot be written.
    """
    folder = cache_folder()
    with (
        os_errors(f"cannot keep standard input in {folder}"),
        tempfile.NamedTemporaryFile(dir=folder, prefix="stdin-", delete=False) as file,
    ):
        atexit.register(Path(file.name).unlink, missing_ok=True)
        file.writelines(chunks)
    return Path(file.name)
