"""Corpora as tokens: what is trained on, what is kept in the cache, what changes meanwhile."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from commands import run_code
from texts import lines, tokens_of

from mhesa.data.corpus import Source, open_corpus
from mhesa.data.files import HASH_BLOCK_BYTES
from mhesa.data.token_files import Tokens
from mhesa.errors import InputError
from mhesa.hf import ByteTokenizer


@pytest.fixture
def bottles(tmp_path):
    path = tmp_path / "bottles.txt"
    path.write_bytes(lines(3000))
    return path


def test_a_corpus_of_one_piece_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InputError, match="of the 5 bytes nothing is left to train on; give more text"):
        tokens_of(tmp_path / "short.txt")


def test_held_out_text_is_not_trained_on(bottles):
    corpus = tokens_of(bottles)
    ids = corpus.tokens[0 : len(corpus.tokens)]
    training = bytes(ids[ids < 256].astype(np.uint8))
    assert corpus.held_out
    assert all(document.data not in training for document in corpus.held_out)
    assert corpus.facts.held_out_bytes + len(training) == bottles.stat().st_size
    assert corpus.facts.training_bytes == len(training)


def test_documents_are_parted_by_end_of_text(tmp_path):
    (tmp_path / "a").write_bytes(b"ab")
    (tmp_path / "b").write_bytes(b"\xff" * 98)
    corpus = tokens_of(tmp_path, holdout="tail:0.5")
    assert corpus.tokens[0:6].tolist() == [256, 97, 98, 256, 255, 255]
    assert corpus.facts.documents == 2


def test_a_small_corpus_holds_its_lowest_piece_out(tmp_path):
    (tmp_path / "few").write_bytes(lines(200))
    corpus = tokens_of(tmp_path / "few", holdout="content:0.000001")
    assert 0 < corpus.facts.held_out_bytes < 2048


def test_the_same_text_is_tokenised_once(bottles, tmp_path):
    bottles.write_bytes(lines(3100))
    read: list[int] = []
    first = open_corpus(Source([str(bottles)]), ByteTokenizer(), read.append)
    assert sum(read) == bottles.stat().st_size
    read.clear()
    again = tmp_path / "other name.txt"
    again.write_bytes(bottles.read_bytes())
    second = open_corpus(Source([str(again)]), ByteTokenizer(), read.append)
    assert read == []
    assert second.facts == first.facts
    for source in (Source([str(bottles)], holdout="tail:0.1"), Source([str(bottles), str(again)])):
        read.clear()
        open_corpus(source, ByteTokenizer(), read.append)
        assert read


@pytest.mark.parametrize("change", ["append", "same size", "same size and time", "and back"])
def test_a_corpus_that_changes_while_it_is_read_is_refused(bottles, change):
    text = lines(5000, change)
    bottles.write_bytes(text)
    source = Source([str(bottles)])
    before = bottles.stat()

    def alter(size):
        if change == "append":
            with bottles.open("ab") as file:
                file.write(b"more\n")
        else:
            bottles.write_bytes(text.swapcase())
        if change == "same size and time":
            os.utime(bottles, ns=(before.st_atime_ns, before.st_mtime_ns))
        if change == "and back":
            time.sleep(0.05)  # longer than a tick of the clock
            bottles.write_bytes(text)

    with pytest.raises(InputError, match=r"bottles.txt changed while it was read; try again when"):
        open_corpus(source, ByteTokenizer(), alter)
    bottles.write_bytes(text)
    assert len(tokens_of(bottles).tokens)


def test_a_corpus_that_changed_before_it_was_read_is_refused(bottles):
    for n in range(5):
        # Within one tick of the clock, if this is quick enough.
        bottles.write_bytes(lines(200, f"before {n}"))
        source = Source([str(bottles)])
        bottles.write_bytes(lines(200, f"BEFORE {n}"))
        with pytest.raises(InputError, match="changed while it was read"):
            open_corpus(source, ByteTokenizer())
        with pytest.raises(InputError, match="changed while it was read"):
            list(source.training_text())


def damages():
    return {
        "missing": lambda path: path.unlink(),
        "empty": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "one bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
    }


@pytest.mark.parametrize("damage", damages())
def test_damaged_files_of_the_cache_are_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("MHESA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").write_bytes(lines(3000))

    def content():
        corpus = tokens_of(tmp_path / "text")
        return corpus.facts, corpus.held_out, corpus.tokens[0 : len(corpus.tokens)].tolist()

    expected = content()
    [folder] = (tmp_path / "cache" / "tokens").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == 5
    for name in names:
        damages()[damage](folder / name)
        assert content() == expected


def test_a_cache_that_cannot_be_written_is_named(bottles, tmp_path, monkeypatch):
    monkeypatch.setenv("MHESA_CACHE", str(tmp_path / "cache"))
    tokens_of(bottles)
    [lock] = (tmp_path / "cache").glob("*.lock")
    lock.unlink(missing_ok=True)
    lock.mkdir()
    with pytest.raises(InputError, match=r"cannot lock .*: .*; name another folder with MHESA_CACHE"):
        tokens_of(bottles)
    monkeypatch.setenv("MHESA_CACHE", str(bottles))
    with pytest.raises(InputError, match=r"cannot make .*: File exists; name another with MHESA_CACHE"):
        tokens_of(bottles)


def test_large_texts_are_tokenised_in_order(tmp_path):
    (tmp_path / "large").write_bytes(lines(900_000))
    corpus = tokens_of(tmp_path / "large", holdout="tail:0.01")
    ids = corpus.tokens[1 : len(corpus.tokens)]
    assert ids.astype(np.uint8).tobytes() == lines(900_000)[: len(ids)]


def test_bytes_take_a_byte_each_and_zeros_are_no_ends(tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(b"\0x\0")
    corpus = tokens_of(tmp_path, holdout="tail:0.3")
    assert corpus.tokens[0:9].tolist() == [256, 0, 120, 0, 256, 0, 120, 0]
    [folder] = (
        path.parent
        for path in Path(os.environ["MHESA_CACHE"]).glob("tokens/*/facts.json")
        if corpus.facts.sha256 in path.read_text()
    )
    assert (folder / "tokens.bin").stat().st_size == corpus.facts.training_tokens


def test_every_stretch_of_a_file_counts(tmp_path):
    text = bytes(HASH_BLOCK_BYTES) + b"the end"
    (tmp_path / "one").write_bytes(text)
    (tmp_path / "other").write_bytes(text[:-1] + b"!")
    (tmp_path / "begin").write_bytes(text[:HASH_BLOCK_BYTES])
    (tmp_path / "end").write_bytes(text[HASH_BLOCK_BYTES:])
    names = (["one"], ["other"], ["begin", "end"])
    digests = {Source([str(tmp_path / name) for name in chosen]).sha256 for chosen in names}
    assert len(digests) == 3


def resident_file_pages():
    """Bytes of mapped files that this process holds in memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssFile" in line]
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_token_files_are_not_kept_in_memory(tmp_path):
    size = 200_000_000
    with (tmp_path / "tokens.bin").open("wb") as file:
        file.truncate(size)
    (tmp_path / "document_starts.bin").write_bytes(bytes(8))
    tokens = Tokens(tmp_path, "uint8", eos_token_id=0)
    before, most = resident_file_pages(), 0
    for nth, start in enumerate(range(0, len(tokens), 10_000)):
        assert not tokens[start : start + 10_000].any()
        most = max(most, resident_file_pages()) if nth % 100 == 0 else most
    assert most - before < size / 4


# The cache

WITHOUT_HOME = """
import os
os.setresuid(54321, 0, 0)
from mhesa.data.cache import cache_folder
from mhesa.errors import InputError
try:
    print(cache_folder())
except InputError as error:
    print(error)
"""
NO_HOME = "there is no home folder to keep tokens in; name one with MHESA_CACHE"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes a user without a name")
@pytest.mark.parametrize("named", [True, False])
def test_a_user_without_home_and_name_can_name_the_cache(named):
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    environment.pop("MHESA_CACHE")
    # A folder that such a user may write to; it is there already.
    environment |= {"MHESA_CACHE": "/tmp"} if named else {}
    assert run_code(WITHOUT_HOME, environment) == (f"{'/tmp' if named else NO_HOME}\n", "")
