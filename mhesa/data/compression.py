"""Compressed files, read as the bytes that were compressed."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from mhesa.errors import InputError

# Compressed bytes decompressed at once. Zstandard can expand these to 64 MiB, the other formats to less.
INPUT_BYTES = 1 << 11
# The largest window that zstandard can ask for (`zstd --long=31`); its library refuses more than 128 MiB
# unless told otherwise.
ZSTANDARD_WINDOW = 1 << 31


@dataclass(frozen=True)
class _Format:
    """How to decompress one format.

    Args:
        new: makes a decompressor for one stream: it has `decompress`, `eof` and `unused_data`.
        errors: what `decompress` raises on damaged data.
        padding: bytes that may follow a stream and mean nothing.
    """

    new: Callable[[], Any]
    errors: tuple[type[Exception], ...]
    padding: bytes = b""


def _zstandard() -> _Format:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTANDARD_WINDOW)
    return _Format(decompressor.decompressobj, (zstandard.ZstdError,))


_FORMATS: dict[str, Callable[[], _Format]] = {
    ".gz": lambda: _Format(lambda: zlib.decompressobj(wbits=31), (zlib.error,), padding=b"\0"),
    ".xz": lambda: _Format(lzma.LZMADecompressor, (lzma.LZMAError,), padding=b"\0"),
    ".bz2": lambda: _Format(bz2.BZ2Decompressor, (OSError, ValueError)),
    ".zst": _zstandard,
}
SUFFIXES = frozenset(_FORMATS)


def decompressed(raw: IO[bytes], suffix: str, name: str) -> IO[bytes]:
    """A file's bytes: decompressed if `suffix` is a compression's, as they are otherwise.

    A file may hold several compressed streams one after the other; all are read. Reading raises `OSError`
    where the data is damaged, cut off, or followed by anything else.

    Args:
        raw: the open file.
        suffix: file extension, in lower case.
        name: name of the file in messages.

    Raises:
        InputError: the library for this format is not installed.
    """
    if suffix not in _FORMATS:
        return raw
    try:
        format_ = _FORMATS[suffix]()
    except ImportError as error:
        raise InputError(f"{name} needs zstandard: pip install 'mhesa[data]'") from error
    return cast(IO[bytes], io.BufferedReader(_Chunks(_decompress(raw, format_))))


def _decompress(raw: IO[bytes], format_: _Format) -> Iterator[bytes]:
    """The output of all streams of a file. The libraries' own readers ignore damage after the first one."""
    stream: Any = None
    unused, streams_read = b"", 0
    while packed := unused or raw.read(INPUT_BYTES):
        unused = b""
        if stream is None:
            if streams_read:
                packed = packed.lstrip(format_.padding)
            if not packed:
                continue
            stream = format_.new()
        try:
            output = stream.decompress(packed)
        except format_.errors as error:
            raise OSError(f"its compressed data is damaged or not supported: {error}") from error
        if stream.eof:
            unused, stream = stream.unused_data, None
            streams_read += 1
        if output:
            yield output
    if stream is not None:
        raise OSError("its compressed data is cut off")


class _Chunks(io.RawIOBase):
    """Chunks of bytes, none of them empty, as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._chunk = chunks, memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from one chunk; 0 at the end."""
        self._chunk = self._chunk or memoryview(next(self._chunks, b""))
        size = min(len(buffer), len(self._chunk))
        buffer[:size] = self._chunk[:size]
        self._chunk = self._chunk[size:]
        return size
