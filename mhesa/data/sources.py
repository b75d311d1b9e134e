"""Sources, as a user names them, and the files that they mean."""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from mhesa.atomic_io import read_json
from mhesa.data.cache import save_chunks
from mhesa.data.files import TEXT_FIELD, Document, File
from mhesa.data.hub import HUB, hub_file
from mhesa.data.standard_input import standard_input
from mhesa.errors import InputError
from mhesa.file_names import RUN_FILES, SETTINGS


def find_files(sources: Sequence[str]) -> list[File]:
    """The files of sources, in order and sorted within a source; a file that is named twice comes once.

    A source is a file, a folder, a glob pattern, `-` for standard input, or `hf://owner/name` for a dataset
    of the hub (`hf://owner/name@configuration:split`). No source at all means the Python standard library's
    source text. A folder means all files in it and in its subfolders, linked ones too, but no pipes and
    devices, nothing whose name begins with a dot, and nothing that `mhesa train` wrote as part of a run.

    Raises:
        InputError: a source, or something in a folder, is not there or cannot be read; or a source is a
            pipe, which can be read only once.
    """
    if not sources:
        return [File.at(path) for path in standard_library()]
    found: dict[tuple[int, int], File] = {}
    for source in sources:
        for file in _expand(source):
            found.setdefault(file.identity(), file)
    return list(found.values())


def read_sources(sources: Sequence[str], text_field: str = TEXT_FIELD) -> list[Document]:
    """Read the documents of sources into memory, see `find_files`; empty ones are left out.

    Raises:
        InputError: a source is not there or cannot be read, or there is no text in any of them.
    """
    documents = [
        Document(name, data)
        for file in find_files(sources)
        for name, chunks in file.documents(text_field)
        if (data := b"".join(chunks))
    ]
    if not documents:
        raise InputError(no_text_in(sources))
    return documents


def no_text_in(sources: Sequence[str]) -> str:
    """The message for sources without text."""
    return f"no text in {', '.join(sources)}: there is no file with anything in it"


def standard_library() -> list[Path]:
    """The Python standard library's source files without its tests: text that is on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts))


def _expand(source: str) -> Iterator[File]:
    if not source:
        raise InputError("a source is empty; give a file, a folder, a pattern, - or hf://owner/name")
    if source == "-":
        yield File(save_chunks(standard_input()), "-", "")
    elif source.startswith(HUB):
        yield File(hub_file(source), source, ".jsonl")
    else:
        yield from map(File.at, _paths(source))


def _paths(source: str) -> list[Path]:
    path = Path(source)
    if os.path.isdir(path):
        return _files_below(path)
    if os.path.lexists(path):
        return [_plain_file(path)]
    if "**" in source:
        # The pattern passes over folders that cannot be read; this names them.
        _files_below(_fixed_part(source))
    matches = [path for path in map(Path, sorted(glob.glob(source, recursive=True))) if not _is_of_run(path)]
    if not matches:
        raise InputError(f"no such file, folder or pattern: {source}")
    return [
        file
        for match in matches
        for file in (_files_below(match) if match.is_dir() else [_plain_file(match)])
    ]


def _plain_file(path: Path) -> Path:
    if not stat.S_ISREG(_stat(path).st_mode):
        raise InputError(f"{path} is a pipe or a device; read it as standard input: - < {path}")
    return path


def _fixed_part(pattern: str) -> Path:
    """The folder in a pattern that stands before the first wildcard."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _files_below(folder: Path) -> list[Path]:
    """The files of a folder, sorted, see `find_files`."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    # Linked folders come last: a file that can be reached without a link is named by that path.
    waiting = deque([folder])
    while waiting:
        for root, folders, names in os.walk(waiting.popleft(), onerror=_refuse):
            place = Path(root)
            identity = File.at(place).identity()
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            visible = [name for name in sorted(names) if not name.startswith(".")]
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
            if _holds_run(place):
                visible = [name for name in visible if name not in RUN_FILES]
                folders[:] = [name for name in folders if name not in RUN_FILES]
            waiting += [place / name for name in folders if os.path.islink(place / name)]
            found += [place / name for name in visible if stat.S_ISREG(_stat(place / name).st_mode)]
    return sorted(found)


def _holds_run(folder: Path) -> bool:
    """Whether `mhesa train` wrote to a folder."""
    try:
        saved = read_json(folder / SETTINGS)
    except InputError:
        return False
    return isinstance(saved, dict) and {"settings", "corpus"} <= saved.keys()


def _is_of_run(path: Path) -> bool:
    """Whether `mhesa train` wrote a file or folder."""
    return any(
        part.name in RUN_FILES and _holds_run(part.parent) for part in (path, *path.parents) if part.name
    )


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        _refuse(error)


def _refuse(error: OSError) -> NoReturn:
    raise InputError(f"cannot read {error.filename}: {error.strerror}") from error
