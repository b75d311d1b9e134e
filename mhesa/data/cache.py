"""The folder where what is made from a corpus is kept, so that nothing is done twice."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from mhesa.atomic_io import write_file
from mhesa.errors import InputError


def cache_folder() -> Path:
    """`MHESA_CACHE`, or `mhesa` below the user's own cache; made if it is not there."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mhesa"
    folder = Path(os.environ.get("MHESA_CACHE") or default)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}; name another with MHESA_CACHE") from error
    return folder


def lock(name: str) -> FileLock:
    """A lock that one process at a time holds, whatever run it belongs to."""
    return FileLock(cache_folder() / f"{name}.lock")


def spool(chunks: Iterable[bytes]) -> Path:
    """Write text to a file, which goes when the process ends: a corpus is read more than once."""
    with tempfile.NamedTemporaryFile(dir=cache_folder(), prefix="stdin-", delete=False) as file:
        atexit.register(Path(file.name).unlink, missing_ok=True)
        try:
            file.writelines(chunks)
        except OSError as error:
            raise InputError(f"cannot keep standard input in {cache_folder()}: {error.strerror}") from error
    return Path(file.name)


def hub_file(source: str) -> Path:
    """The rows of a dataset as JSON lines, streamed from the hub once and kept.

    Args:
        source: `hf://owner/name`, `hf://owner/name@configuration:split`, or `hf://` and a folder.

    Raises:
        InputError: `datasets` is not installed, or has no such dataset.
    """
    path = cache_folder() / f"hub-{hashlib.sha256(source.encode()).hexdigest()[:32]}.jsonl"
    with lock(path.stem):
        if not path.exists():
            _download(source, path)
    return path


def _download(source: str, path: Path) -> None:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"{source} needs datasets: pip install 'mhesa[data]'") from error
    address, _, split = source.removeprefix("hf://").partition(":")
    name, _, configuration = address.partition("@")
    try:
        rows = load_dataset(name, configuration or None, split=split or "train", streaming=True)
        with write_file(path) as file:
            for row in rows:
                text = {key: value for key, value in row.items() if isinstance(value, str)}
                file.write(json.dumps(text).encode() + b"\n")
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot read {source}: {str(error).splitlines()[0]}") from error
