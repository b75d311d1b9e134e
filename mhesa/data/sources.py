"""Sources: what a person names, and the documents that are in it, read piece by piece."""

from __future__ import annotations

import bz2
import glob
import gzip
import hashlib
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from mhesa.data.cache import hub_file, spool
from mhesa.data.standard_input import standard_input
from mhesa.errors import InputError

CHUNK = 1 << 20
STRETCH = 1 << 26
HUB = "hf://"
TEXT_FIELD = "text"
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)

Report = Callable[[int], object]


def _ignore(amount: int) -> None:
    """Take no notice of progress."""


@dataclass(frozen=True)
class Document:
    """A stretch of text that stands alone, as the bytes it was read as."""

    name: str
    data: bytes


@dataclass(frozen=True)
class File:
    """A file with documents in it: one, or one a line of JSON, or one a row of parquet.

    Args:
        path: where it is; `.gz`, `.xz`, `.zst` and `.bz2` are decompressed as they are read.
        name: what messages call it.
        form: its suffix without the compression's, which decides how it is read.
    """

    path: Path
    name: str
    form: str

    @classmethod
    def at(cls, path: Path) -> File:
        """The file at `path`, named after it."""
        suffix = path.suffix.lower()
        return cls(path, str(path), Path(path.stem).suffix.lower() if suffix in OPENERS else suffix)

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self.path.stat().st_size

    def stretches(self) -> range:
        """Where the stretches of the file begin that are hashed one by one, on several cores."""
        return range(0, max(self.size, 1), STRETCH)

    def sha256(self, start: int) -> str:
        """The digest of a stretch of what is on the disk, and of how the file is read."""
        how = f"{self.path.suffix.lower()} {self.form}" if start == 0 else f"{start}"
        digest = hashlib.sha256(f"{how}\n".encode())
        buffer = memoryview(bytearray(CHUNK))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                left = STRETCH
                while size := file.readinto(buffer[:left]):
                    digest.update(buffer[:size])
                    left -= size
        except OSError as error:
            raise InputError(f"cannot read {self.name}: {error.strerror}") from error
        return digest.hexdigest()

    def documents(
        self, text_field: str = TEXT_FIELD, on_read: Report = _ignore
    ) -> Iterator[tuple[str, Iterator[bytes]]]:
        """The documents in order, each a name and its bytes in chunks, to be used up before the next.

        Args:
            text_field: the field of JSON lines and the column of parquet that holds the text.
            on_read: called with the bytes of the file that were read.

        Raises:
            InputError: the file cannot be read, or is not what its suffix says.
        """
        read = _parquet if self.form in PARQUET else _json_lines if self.form in JSON_LINES else _whole
        with _naming(self):
            yield from read(self, text_field, on_read)


def _whole(file: File, text_field: str, on_read: Report) -> Iterator[tuple[str, Iterator[bytes]]]:
    with _open(file) as (text, raw):
        yield file.name, _chunks(file, text, raw, on_read)


def _chunks(file: File, text: IO[bytes], raw: IO[bytes], on_read: Report) -> Iterator[bytes]:
    before = 0
    with _naming(file):
        while chunk := text.read(CHUNK):
            on_read(raw.tell() - before)
            before = raw.tell()
            yield chunk


@contextmanager
def _naming(file: File) -> Iterator[None]:
    """Say of an error in reading which file it is in."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot read {file.name}: {reason}") from error


def _json_lines(file: File, text_field: str, on_read: Report) -> Iterator[tuple[str, Iterator[bytes]]]:
    before = 0
    with _open(file) as (text, raw):
        for number, line in enumerate(text, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file.name}, line {number} is not JSON: {error}") from error
            yield f"{file.name}:{number}", iter([_field(row, text_field, f"{file.name}, line {number}")])
            if raw.tell() - before >= CHUNK:
                on_read(raw.tell() - before)
                before = raw.tell()


def _parquet(file: File, text_field: str, on_read: Report) -> Iterator[tuple[str, Iterator[bytes]]]:
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
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield f"{file.name}:{row}", iter([_as_bytes(value, f"{file.name}, row {row}", text_field)])
            on_read(file.size * len(batch) // table.metadata.num_rows)
    except arrow.ArrowException as error:
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


# Files


class _open:  # noqa: N801 used like the function of that name
    """A context of a file's text and of the file below it, whose position tells progress."""

    def __init__(self, file: File) -> None:
        self.raw: IO[bytes] = file.path.open("rb")
        opener = OPENERS.get(file.path.suffix.lower(), _plain)
        self.text = opener(self.raw, file.name)

    def __enter__(self) -> tuple[IO[bytes], IO[bytes]]:
        return self.text, self.raw

    def __exit__(self, *error: object) -> None:
        self.text.close()
        self.raw.close()


def _plain(raw: IO[bytes], name: str) -> IO[bytes]:
    return raw


def _zstandard(raw: IO[bytes], name: str) -> IO[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{name} needs zstandard: pip install 'mhesa[data]'") from error
    return cast(IO[bytes], _Zstandard(zstandard, raw))


class _Zstandard:
    """A reader like the others. zstandard's own takes a file that was cut off for one that ends."""

    def __init__(self, library: Any, raw: IO[bytes]) -> None:
        self.library = library
        self.raw = raw
        self.frame = library.ZstdDecompressor().decompressobj()
        self.within_frame = False

    def read(self, size: int) -> bytes:
        """Read some bytes, none at the end."""
        data = b""
        while not data:
            packed = self.frame.unused_data if self.frame.eof else b""
            packed = packed or self.raw.read(1 << 14)
            if not packed:
                if self.within_frame:
                    raise EOFError("the file was cut off")
                break
            if self.frame.eof:
                self.frame = self.library.ZstdDecompressor().decompressobj()
            try:
                data = self.frame.decompress(packed)
            except self.library.ZstdError as error:
                raise EOFError(f"damaged zstandard data: {error}") from error
            self.within_frame = not self.frame.eof
        return data

    def close(self) -> None:
        """The file below is closed by whoever opened it."""

    def __iter__(self) -> Iterator[bytes]:
        rest = b""
        while chunk := self.read(CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines
        yield rest


# What opens a file here is closed by `_open`, which the linter cannot see.
OPENERS: dict[str, Callable[[IO[bytes], str], IO[bytes]]] = {
    ".gz": lambda raw, name: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    ".xz": lambda raw, name: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115
    ".bz2": lambda raw, name: cast(IO[bytes], bz2.BZ2File(raw)),
    ".zst": _zstandard,
}


# What a person names


def find_files(sources: Sequence[str]) -> list[File]:
    """The files that sources name, each once, in their order and sorted within one.

    A source is a file, a folder (all files below, hidden ones apart), a glob pattern, `-` for standard
    input, or `hf://owner/name` for a dataset of the hub (`hf://owner/name@configuration:split`). None at
    all means the Python standard library's source text.

    Raises:
        InputError: a source that is not there, or a pipe, which can be read only once.
    """
    if not sources:
        return [File.at(path) for path in standard_library()]
    found: dict[Path, File] = {}
    for source in sources:
        for file in _expand(source):
            found.setdefault(file.path, file)
    return list(found.values())


def read_sources(sources: Sequence[str], text_field: str = TEXT_FIELD) -> list[Document]:
    """Read all that sources name into memory, see `find_files`; empty documents are passed over.

    Raises:
        InputError: a source that is not there or cannot be read, or nothing to read in all of them.
    """
    documents = [
        Document(name, data)
        for file in find_files(sources)
        for name, chunks in file.documents(text_field)
        if (data := b"".join(chunks))
    ]
    if not documents:
        raise InputError(nothing_in(sources))
    return documents


def nothing_in(sources: Sequence[str]) -> str:
    """What is to be said of sources without text."""
    return f"no text in {', '.join(sources)}: there is no file with anything in it"


def standard_library() -> list[Path]:
    """The Python standard library's own source files, its tests apart: text that is on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not apart & set(path.relative_to(root).parts))


def _expand(source: str) -> Iterator[File]:
    if source == "-":
        yield File(spool(standard_input()), "-", "")
    elif source.startswith(HUB):
        yield File(hub_file(source), source, ".jsonl")
    else:
        for path in _paths(source):
            if not path.is_file():
                raise InputError(f"{path} is a pipe or a device; read it as standard input: - < {path}")
            yield File.at(path)


def _paths(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        return _files_below(path)
    if path.exists():
        return [path]
    matches = sorted(glob.glob(source, recursive=True))
    if not matches:
        raise InputError(f"no such file, folder or pattern: {source}")
    return [path for match in map(Path, matches) for path in _files_below_or_itself(match)]


def _files_below_or_itself(path: Path) -> list[Path]:
    return _files_below(path) if path.is_dir() else [path]


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
