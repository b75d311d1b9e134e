"""Reading, holding out and windowing text."""

import bz2
import gzip
import json
import lzma
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mhesa import data
from mhesa.data import Holdout, Source, Windows, open_corpus, pack, read_sources, standard_library
from mhesa.data.corpus import Tokens
from mhesa.data.holdout import cut
from mhesa.data.sources import STRETCH
from mhesa.errors import InputError
from mhesa.hf import ByteTokenizer


def joined(documents):
    return b"".join(document.data for document in documents)


# Sources


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a.txt").write_bytes(b"first \xff\xfe\x00 bytes")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_bytes(b"third")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_bytes(b"unseen")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_a_folder_gives_its_files_as_they_are(texts):
    assert [document.data for document in read_sources([str(texts)])] == [
        b"first \xff\xfe\x00 bytes",
        b"second",
        b"third",
    ]


def test_a_file_named_twice_is_read_once(texts):
    sources = [str(texts / "b.txt"), str(texts / "*.txt"), str(texts / "**" / "*.md")]
    assert joined(read_sources(sources)) == b"second" + b"first \xff\xfe\x00 bytes" + b"third"


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "notes[1].txt").write_bytes(b"here")
    assert joined(read_sources([str(tmp_path / "notes[1].txt")])) == b"here"


def test_dash_is_standard_input(texts, standard_input):
    standard_input(b"piped \xff")
    assert joined(read_sources([str(texts / "b.txt"), "-"])) == b"secondpiped \xff"


def test_an_interrupt_is_heard_though_it_cuts_no_read_short(monkeypatch):
    def interrupt():
        # Once the other thread waits; a signal that this thread gets does not wake it.
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    reader, writer = os.pipe()
    # What starts tests in the background has signals from the keyboard ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(reader) as stdin, open(writer, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            next(data.standard_input())
    signal.signal(signal.SIGINT, before)


def test_no_source_is_the_standard_library():
    names = {path.name for path in standard_library()}
    assert {"argparse.py", "json"} - names == {"json"}
    assert not any("site-packages" in path.parts or "test" in path.parts for path in standard_library())
    assert len(joined(read_sources([]))) > 1_000_000


@pytest.mark.parametrize("name", ["missing.txt", "missing/*.txt"])
def test_a_missing_source_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"no such file, folder or pattern: .*missing"):
        read_sources([str(tmp_path / name)])


def test_sources_without_text_are_refused(texts):
    with pytest.raises(InputError, match=r"no text in .*empty\.txt: there is no file"):
        read_sources([str(texts / "empty.txt")])


def test_an_unreadable_file_is_named():
    # A file that not even the superuser can read from its start.
    with pytest.raises(InputError, match="cannot read /proc/self/mem: Input/output error"):
        read_sources(["/proc/self/mem"])


# Holding out


def lines(n, word="line"):
    return "".join(f"{word} {index}: {index * index}\n" for index in range(n)).encode()


def split(documents, holdout):
    """Training and held-out text of documents in memory, each a list of stretches."""
    kept, held_out = [], []
    for piece in Holdout.parse(holdout).split([[text] for text in documents], sum(map(len, documents))):
        side = held_out if piece.held_out else kept
        if piece.starts:
            side.append(b"")
        side[-1] += piece.data
    return kept, held_out


def test_tail_is_the_end_of_the_corpus():
    kept, held_out = split([bytes(700), b"x" * 300], "tail:0.1")
    assert held_out == [b"x" * 100]
    assert kept == [bytes(700), b"x" * 200]


@given(
    texts=st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.9),
    method=st.sampled_from(["content", "tail"]),
)
def test_nothing_is_lost_and_nothing_is_on_both_sides(texts, fraction, method):
    kept, held_out = split(texts, f"{method}:{fraction}")
    assert len(b"".join(kept)) + len(b"".join(held_out)) == sum(map(len, texts))


def test_content_decides_and_not_names_or_order():
    a, b = lines(20_000), lines(20_000, "other")
    sides = [tuple(map(sorted, split(documents, "content:0.1"))) for documents in ([a, b], [b, a])]
    assert sides[0] == sides[1]
    share = sum(map(len, sides[0][1])) / (len(a) + len(b))
    assert 0.03 < share < 0.2


def test_equal_pieces_fall_on_one_side():
    document = lines(40_000)
    kept, held_out = split([document, document], "content:0.1")
    assert held_out
    assert all(piece not in b"".join(kept) for piece in held_out)


def test_pieces_end_with_lines():
    _, held_out = split([lines(40_000)], "content:0.1")
    assert all(piece.startswith(b"line ") and piece.endswith(b"\n") for piece in held_out)


@given(
    chunks=st.lists(
        st.sampled_from([b"a line\n", b"no line", "é漢🎉".encode() * 5, b"\xff" * 9]), max_size=60
    ),
    size=st.integers(8, 40),
    chunk=st.integers(1, 30),
)
def test_cutting_does_not_depend_on_chunks(chunks, size, chunk):
    text = b"".join(chunks)
    pieces = list(cut([text], size))
    assert b"".join(pieces) == text
    assert all(len(piece) <= 2 * size for piece in pieces)
    assert list(cut([text[i : i + chunk] for i in range(0, len(text), chunk)], size)) == pieces


def test_characters_are_not_cut():
    assert all(piece.decode() for piece in cut(["漢字🎉é".encode() * 100], size=10))


@pytest.mark.parametrize(
    "text", ["", "tail", "tail:0", "tail:1", "tail:nan", "tail:x", "head:0.1", "content:-1"]
)
def test_a_holdout_that_cannot_be_is_refused(text):
    with pytest.raises(InputError, match="holdout must be"):
        Holdout.parse(text)


# Corpora


@pytest.fixture
def bottles(tmp_path):
    path = tmp_path / "bottles.txt"
    path.write_bytes(lines(3000))
    return path


def tokens_of(path, tokenizer=None, **options):
    return open_corpus(Source([str(path)], **options), tokenizer or ByteTokenizer())


def test_a_corpus_of_one_piece_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InputError, match="too small to hold text out"):
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


COMPRESSORS = {
    "gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "zst": lambda path, data: path.write_bytes(zstandard.compress(data)),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_text_is_the_text(tmp_path, suffix):
    path = tmp_path / f"text.txt.{suffix}"
    COMPRESSORS[suffix](path, lines(50_000))
    assert [document.data for document in read_sources([str(path)])] == [lines(50_000)]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"none of it"])
def test_damaged_compression_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"text.{suffix}"
    COMPRESSORS[suffix](path, lines(5000))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"cannot read .*text\.{suffix}: "):
        tokens_of(path)


TEXTS = ["first\nof two lines", "é漢", "third"]


def write_json_lines(path):
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS) + "\n")


def write_parquet(path):
    table = pyarrow.table({"text": TEXTS, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [("rows.jsonl", write_json_lines), ("rows.parquet", write_parquet)],
)
def test_a_row_is_a_document(tmp_path, name, write):
    write(tmp_path / name)
    found = read_sources([str(tmp_path / name)])
    assert [document.data.decode() for document in found] == TEXTS
    assert found[1].name.endswith(f"{name}:2")
    with pytest.raises(InputError, match=r"rows.* has no field body; its fields are text, id: name one with"):
        read_sources([str(tmp_path / name)], "body")
    with pytest.raises(InputError, match="the field id holds int, not text"):
        read_sources([str(tmp_path / name)], "id")


def test_rows_that_are_none_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 is not JSON"):
        read_sources([str(tmp_path / "rows.jsonl")])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"rows.parquet is not parquet"):
        read_sources([str(tmp_path / "rows.parquet")])


def test_a_dataset_of_the_hub_is_streamed_once(tmp_path):
    write_json_lines(tmp_path / "data.jsonl")
    source = f"hf://{tmp_path}"
    assert [document.data.decode() for document in read_sources([source])] == TEXTS
    (tmp_path / "data.jsonl").unlink()
    assert [document.data.decode() for document in read_sources([source])] == TEXTS
    with pytest.raises(InputError, match=r"cannot read hf:///nowhere: "):
        read_sources(["hf:///nowhere"])


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is a pipe or a device; read it as standard input: - < "):
        read_sources([str(tmp_path / "pipe")])


def test_nothing_is_tokenised_twice(bottles, tmp_path):
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


def test_a_torn_token_file_is_made_again(bottles):
    corpus = tokens_of(bottles, holdout="content:0.07")
    cache = Path(os.environ["MHESA_CACHE"]) / "tokens"
    torn = next(path for path in cache.iterdir() if corpus.facts.sha256 in (path / "facts.json").read_text())
    (torn / "tokens.bin").write_bytes(b"\0\0")
    assert len(tokens_of(bottles, holdout="content:0.07").tokens) == len(corpus.tokens)


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
    text = bytes(STRETCH) + b"the end"
    (tmp_path / "one").write_bytes(text)
    (tmp_path / "other").write_bytes(text[:-1] + b"!")
    (tmp_path / "begin").write_bytes(text[:STRETCH])
    (tmp_path / "end").write_bytes(text[STRETCH:])
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
    (tmp_path / "begins.bin").write_bytes(bytes(8))
    tokens = Tokens(tmp_path, "uint8", eos_token_id=0)
    before, most = resident_file_pages(), 0
    for nth, start in enumerate(range(0, len(tokens), 10_000)):
        assert not tokens[start : start + 10_000].any()
        most = max(most, resident_file_pages()) if nth % 100 == 0 else most
    assert most - before < size / 4


# Windows


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5))
def test_packing_parts_windows_and_documents(rows):
    ids = torch.tensor(rows)
    packed, offsets = pack(ids.clone(), eos_token_id=3)
    assert torch.equal(packed[0], ids.flatten())
    begins = {i for i, token in enumerate(ids.flatten().tolist()) if token == 3 or i % 6 == 0}
    assert set(offsets.tolist()) == begins | {ids.numel()}


def windows_of(length, context=10, rows=4, seed=0, streams=False):
    return Windows(np.arange(length), context=context, rows=rows, seed=seed, streams=streams)


@given(length=st.integers(20, 300), context=st.integers(1, 8), rows=st.integers(1, 5), seed=st.integers(0, 3))
def test_a_pass_visits_no_token_twice(length, context, rows, seed):
    windows = windows_of(length, context, rows, seed)
    starts = np.concatenate([windows.starts(step) for step in range(3 * windows.per_pass)])
    for nth in range(3):
        part = starts[nth * windows.per_pass : (nth + 1) * windows.per_pass]
        ids = windows.read(part)
        seen = ids[:, :-1].flatten().tolist()
        assert len(set(seen)) == len(seen) == windows.per_pass * context
        assert length - 1 - len(seen) < 2 * context
        assert (ids.diff(dim=1) == 1).all()


@given(length=st.integers(50, 400), context=st.integers(1, 8), rows=st.integers(1, 5), seed=st.integers(0, 3))
def test_streams_go_on_where_they_stopped(length, context, rows, seed):
    windows = windows_of(length, context, rows, seed, streams=True)
    seen = []
    before = torch.zeros(rows, 1)
    for step in range(2 * windows.per_pass):
        ids = windows.read(windows.starts(step))
        assert windows.begins(step) == (step % windows.per_pass == 0)
        if not windows.begins(step):
            assert torch.equal(ids[:, 0], before[:, -1])
        before = ids
        seen += ids[:, :-1].flatten().tolist() if step < windows.per_pass else []
    assert len(set(seen)) == len(seen)
    assert length - len(seen) <= 2 * rows * context + 1


def test_step_and_seed_decide_the_windows():
    one, other, third = (windows_of(1000, seed=seed) for seed in (1, 1, 2))
    backwards = [other.starts(step).tolist() for step in reversed(range(300))][::-1]
    assert [one.starts(step).tolist() for step in range(300)] == backwards
    assert [third.starts(step).tolist() for step in range(300)] != backwards


def test_passes_differ_in_offset_and_order():
    windows = windows_of(1000, rows=1)
    first, second = (
        [int(windows.starts(nth * windows.per_pass + index)[0]) for index in range(windows.per_pass)]
        for nth in range(2)
    )
    assert first[0] % 10 != second[0] % 10
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="has 8 tokens, fewer than one window of 8 and the token behind it"):
        windows_of(8, context=8)
    with pytest.raises(InputError, match="fewer than 4 streams of a window of 8"):
        windows_of(32, context=8, streams=True)
