"""Files of text, and the documents in them, read in chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mhesa.atomic_io import read_chunks
from mhesa.data.compression import SUFFIXES, decompressed
from mhesa.errors import InputError, os_errors

CHUNK_BYTES = 1 << 20
# A file is hashed in blocks of this many bytes, in parallel.
HASH_BLOCK_BYTES = 1 << 26
ROWS_AT_ONCE = 256
TEXT_FIELD = "text"
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)

# Called with a number of bytes that were read.
OnRead = Callable[[int], object]


@dataclass(frozen=True)
class Document:
    """A text, as bytes, and the name of the place it was read from."""

    name: str
    data: bytes


@dataclass(frozen=True)
class File:
    """A file that holds one document, or one in each line of JSON or row of parquet.

    Args:
        path: where it is.
        name: name of the file in messages.
        form: its suffix without a compression's, in lower case; decides how it is read.
    """

    path: Path
    name: str
    form: str

    @classmethod
    def at(cls, path: Path) -> File:
        """The file at `path`, named after it."""
        suffix = path.suffix.lower()
        return cls(path, str(path), Path(path.stem).suffix.lower() if suffix in SUFFIXES else suffix)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.path.stat().st_size

    def identity(self) -> tuple[int, int]:
        """What all names of the file have in common: device and inode."""
        return self.version()[:2]

    def version(self) -> tuple[int, int, int, int, int]:
        """Numbers that differ after a change of the file: device, inode, size and times.

        A change within a tick of the system's clock, a few milliseconds, can leave them as they were.
        """
        with os_errors(f"cannot read {self.name}"):
            stat = self.path.stat()
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

    def hash_blocks(self) -> range:
        """Where the blocks begin that `sha256` takes."""
        return range(0, max(self.size, 1), HASH_BLOCK_BYTES)

    def sha256(self, start: int) -> str:
        """The digest of one block of the file, and of how the file is read.

        Raises:
            InputError: the file cannot be read.
        """
        how = f"{self.path.suffix.lower()} {self.form}" if start == 0 else f"{start}"
        digest = hashlib.sha256(f"{how}\n".encode())
        with os_errors(f"cannot read {self.name}"):
            for chunk in read_chunks(self.path, start, HASH_BLOCK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def documents(
        self, text_field: str = TEXT_FIELD, on_read: OnRead = lambda size: None
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """The documents in order: each a name and its bytes in chunks, to be used up before the next.

        Args:
            text_field: the field of JSON lines or the column of parquet that holds the text.
            on_read: called with the bytes of the file that were read, compressed ones as they are.

        Raises:
            InputError: the file cannot be read, or does not hold what its suffix says.
        """
        read = _parquet if self.form in PARQUET else _json_lines if self.form in JSON_LINES else _whole
        with os_errors(f"cannot read {self.name}"):
            yield from read(self, text_field, on_read)


@contextmanager
def _open(file: File) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file's text, and the file itself, whose position is the progress."""
    with (
        file.path.open("rb") as raw,
        decompressed(raw, file.path.suffix.lower(), file.name) as text,
    ):
        yield text, raw


def _whole(file: File, text_field: str, on_read: OnRead) -> Iterator[tuple[str, Iterator[bytes]]]:
    with _open(file) as (text, raw):
        yield file.name, _chunks(file, text, raw, on_read)


def _chunks(file: File, text: IO[bytes], raw: IO[bytes], on_read: OnRead) -> Iterator[bytes]:
    position = 0
    with os_errors(f"cannot read {file.name}"):
        while chunk := text.read(CHUNK_BYTES):
            on_read(raw.tell() - position)
            position = raw.tell()
            yield chunk


def _json_lines(file: File, text_field: str, on_read: OnRead) -> Iterator[tuple[str, Iterator[bytes]]]:
    position = 0
    with _open(file) as (text, raw):
        for number, line in enumerate(text, start=1):
            if line.strip():
                place = f"{file.name}, line {number}"
                yield f"{file.name}:{number}", iter([_field(_parse(line, place), text_field, place)])
            if raw.tell() - position >= CHUNK_BYTES:
                on_read(raw.tell() - position)
                position = raw.tell()
        on_read(raw.tell() - position)


def _parse(line: bytes, place: str) -> Any:
    """The value of a line of JSON, all its numbers 0: Python takes long, and refuses to read, huge ones."""
    try:
        return json.loads(line, parse_int=lambda digits: 0, parse_float=lambda digits: 0.0)
    except ValueError as error:
        raise InputError(f"{place} is not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{place} is nested too deeply to be read") from error


def _parquet(file: File, text_field: str, on_read: OnRead) -> Iterator[tuple[str, Iterator[bytes]]]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(f"{file.name} needs pyarrow: pip install 'mhesa[data]'") from error
    try:
        table = parquet.ParquetFile(file.path)
        if text_field not in table.schema_arrow.names:
            raise InputError(_no_field(file.name, text_field, table.schema_arrow.names))
        row = 0
        for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=[text_field]):
            column = batch.column(0)
            if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type):
                # As bytes, which need not be UTF-8.
                column = column.cast(arrow.large_binary())
            for value in column.to_pylist():
                row += 1
                yield f"{file.name}:{row}", iter([_as_bytes(value, f"{file.name}, row {row}", text_field)])
            on_read(file.size * len(batch) // table.metadata.num_rows)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{file.name} is not parquet: {error}") from error


def _field(row: Any, name: str, place: str) -> bytes:
    if not isinstance(row, dict) or name not in row:
        raise InputError(_no_field(place, name, list(row) if isinstance(row, dict) else []))
    return _as_bytes(row[name], place, name)


def _as_bytes(value: Any, place: str, name: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InputError(f"{place}: the field {name} holds {type(value).__name__}, not text")
    return value.encode("utf-8", "surrogatepass")


def _no_field(place: str, name: str, names: Sequence[str]) -> str:
    there = ", ".join(map(str, names[:10])) or "none"
    return f"{place} has no field {name}; its fields are {there}: name one with --text-field"
