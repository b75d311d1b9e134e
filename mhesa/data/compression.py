"""Compressed files, read as the bytes that were compressed."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
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
    return cast(IO[bytes], io.BufferedReader(_Streams(raw, format_)))


class _Streams(io.RawIOBase):
    """Decompresses all streams of a file. The libraries' own readers ignore damage after the first one."""

    def __init__(self, raw: IO[bytes], format_: _Format) -> None:
        self._raw = raw
        self._format = format_
        self._stream: Any = None
        self._streams_read = 0
        self._unused = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is output; 0 at the end."""
        if not self._output:
            self._output = memoryview(self._decompress())
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _decompress(self) -> bytes:
        """The next output, empty at the end."""
        output = b""
        while not output:
            packed = self._unused or self._raw.read(INPUT_BYTES)
            if not packed:
                break
            self._unused = b""
            if self._stream is None:
                if self._streams_read:
                    packed = packed.lstrip(self._format.padding)
                if not packed:
                    continue
                self._stream = self._format.new()
            try:
                output = self._stream.decompress(packed)
            except self._format.errors as error:
                raise OSError(f"its compressed data is damaged or not supported: {error}") from error
            if self._stream.eof:
                self._unused = self._stream.unused_data
                self._stream = None
                self._streams_read += 1
        if not output and self._stream is not None:
            raise OSError("its compressed data is cut off")
        return output
