"""Datasets of the Hugging Face hub, kept as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path

from mhesa.atomic_io import sha256
from mhesa.data.cache import cached_folder, digest
from mhesa.errors import InputError

HUB = "hf://"
ROWS = "rows.jsonl"


def hub_file(source: str) -> Path:
    """The rows of a dataset as JSON lines, cached: one of the hub for ever, a local one until it changes.

    Args:
        source: `hf://owner/name`, `hf://owner/name@configuration:split`, or `hf://` and a folder.

    Raises:
        InputError: `datasets` is not installed, there is no such dataset or none is named, or a folder
            changed meanwhile.
    """
    address, _, split = source.removeprefix(HUB).partition(":")
    name, _, configuration = address.partition("@")
    if not name:
        raise InputError(f"{source} names no dataset; give hf://owner/name")
    content = _local_content(name)

    def download(folder: Path) -> None:
        _download(source, name, configuration or None, split or "train", folder / ROWS)
        if _local_content(name) != content:
            raise InputError(f"{source} changed while it was read; try again when it is complete")

    return cached_folder(f"hub-{digest(source, content)[:32]}", download) / ROWS


def _local_content(name: str) -> list[tuple[str, str]]:
    """The names and digests of the files of a local dataset; nothing for one of the hub."""
    try:
        return [(str(path), sha256(path)) for path in sorted(Path(name).rglob("*")) if path.is_file()]
    except OSError as error:
        raise InputError(f"cannot read {error.filename or name}: {error.strerror}") from error


def _download(source: str, name: str, configuration: str | None, split: str, path: Path) -> None:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(f"{source} needs datasets: pip install 'mhesa[data]'") from error
    try:
        rows = load_dataset(name, configuration, split=split, streaming=True)
        with path.open("wb") as file:
            for row in rows:
                text = {key: value for key, value in row.items() if isinstance(value, str)}
                file.write(json.dumps(text).encode() + b"\n")
    except (OSError, ValueError, RuntimeError) as error:
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise InputError(f"cannot read {source}: {reason}") from error
