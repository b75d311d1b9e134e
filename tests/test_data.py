"""Reading, holding out and windowing text."""

import bz2
import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mhesa import data
from mhesa.data import Holdout, Source, Windows, find_files, open_corpus, pack, read_sources, standard_library
from mhesa.data.files import HASH_BLOCK_BYTES
from mhesa.data.holdout import Piece, PieceCounter, Selection, content_rank, cut
from mhesa.data.token_files import Tokens
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


def test_one_file_under_many_names_is_read_once(texts, monkeypatch):
    monkeypatch.chdir(texts)
    (texts / "link.txt").symlink_to("b.txt")
    os.link(texts / "b.txt", texts / "hard.txt")
    (texts / "again").symlink_to("deep")
    spellings = ["b.txt", "./b.txt", "deep/../b.txt", str(texts / "b.txt"), "link.txt", "hard.txt", "*b.txt"]
    assert joined(read_sources(spellings)) == b"second"
    assert [Path(document.name).name for document in read_sources(["."])] == ["a.txt", "b.txt", "c.md"]
    assert read_sources(["again", "deep", "."])[0].data == b"third"


def test_linked_folders_are_read_and_circles_of_them_end(texts, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.txt").write_bytes(b"linked")
    (elsewhere / "back").symlink_to(texts)
    (texts / "deep" / "there").symlink_to(elsewhere)
    (texts / "deep" / "self").symlink_to(".")
    assert joined(read_sources([str(texts)])) == b"first \xff\xfe\x00 bytessecondthirdlinked"


def test_what_cannot_be_read_below_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "dangling").symlink_to("nothing")
    for source in (tmp_path, tmp_path / "dangling", tmp_path / "*"):
        with pytest.raises(InputError, match=r"cannot read .*dangling: No such file or directory"):
            read_sources([str(source)])
    (tmp_path / "dangling").unlink()
    # A folder that not even the superuser can list by its path, which is too long.
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    for source in (tmp_path, tmp_path / "**" / "*.txt"):
        with pytest.raises(InputError, match=r"cannot read .*ddd: File name too long"):
            read_sources([str(source)])


@contextmanager
def ordinary_user():
    """Not the superuser, who may read anything."""
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        yield
    finally:
        if superuser:
            os.seteuid(0)


def test_a_folder_without_permission_is_named():
    with TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        (Path(folder) / "closed").mkdir(0o000)
        with ordinary_user(), pytest.raises(InputError, match=r"cannot read .*closed: Permission denied"):
            read_sources([folder])
        (Path(folder) / "closed").chmod(0o700)


def test_files_of_a_run_are_no_text(texts):
    before = Source([str(texts)]).sha256
    for run in (texts, texts / "runs" / "one"):
        (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (run / "settings.json").write_text(json.dumps({"settings": {}, "corpus": {}}))
        for name in ("metrics.jsonl", "model.safetensors", "checkpoints/checkpoint-1/model.safetensors"):
            (run / name).write_text("{}")
    assert Source([str(texts)]).sha256 == before
    assert Source([str(texts / "**")]).sha256 == before
    (texts / "runs" / "one" / "notes.txt").write_bytes(b"fourth")
    assert joined(read_sources([str(texts)])).endswith(b"fourth")
    # A file of that name that is no run's is text like any other.
    (texts / "deep" / "settings.json").write_text("[]")
    (texts / "deep" / "metrics.jsonl").write_text('{"text": "row"}')
    assert b"row" in joined(read_sources([str(texts)]))


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


def held_out_share(path, holdout="content:0.05"):
    facts = tokens_of(path, holdout=holdout).facts
    assert facts.held_out_bytes + facts.training_bytes > 0
    return facts.held_out_bytes / (facts.held_out_bytes + facts.training_bytes)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3])
def test_of_one_line_repeated_the_fraction_is_held_out(tmp_path, fraction):
    (tmp_path / "river").write_bytes(b"river\n" * 20_000)
    assert held_out_share(tmp_path, f"content:{fraction}") == pytest.approx(fraction, abs=0.01)


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_of_one_document_repeated_the_fraction_is_held_out(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ["the same"] * 1000)
    assert held_out_share(tmp_path) == pytest.approx(0.05, abs=0.002)


def sides(path, holdout="content:0.05"):
    """The pieces on both sides, as open_corpus would have them."""
    source = Source([str(path)], holdout=holdout)
    pieces = list(source.pieces())
    while not source.is_settled:
        pieces = list(source.pieces())
    return [[piece.data for piece in pieces if piece.held_out is side] for side in (False, True)]


@pytest.mark.parametrize(
    "repeats", [[("N/A", 900)], [("N/A", 500), ("none", 700)]], ids=["one text", "two texts"]
)
def test_texts_that_repeat_a_lot_are_trained_on_and_others_make_up_for_them(tmp_path, repeats):
    texts = [text for text, count in repeats for _ in range(count)] + [f"text {n}" * 9 for n in range(400)]
    write_rows(tmp_path / "rows.jsonl", texts)
    trained_on, held_out = sides(tmp_path)
    assert not set(trained_on) & set(held_out)
    assert not {text.encode() for text, _ in repeats} & set(held_out)
    assert 0.025 < held_out_share(tmp_path) < 0.1


def test_of_a_few_texts_repeated_one_is_held_out_if_it_is_about_the_fraction(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [f"text {n % 10}" for n in range(1000)])
    trained_on, held_out = sides(tmp_path)
    assert len(set(held_out)) == 1
    assert not set(trained_on) & set(held_out)
    assert held_out_share(tmp_path) == pytest.approx(0.1)


def test_of_two_texts_repeated_the_fraction_is_held_out(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [f"text {n % 2}" for n in range(1000)])
    assert held_out_share(tmp_path) == pytest.approx(0.05, abs=0.003)


def test_a_vocabulary_is_learnt_from_training_text_alone(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [f"text {n % 10}" for n in range(1000)])
    trained_on, _ = sides(tmp_path)
    assert set(Source([str(tmp_path)]).training_text()) == set(trained_on)


def test_what_repeats_is_found_in_bounded_memory():
    counter = PieceCounter(Holdout("content", 0.05), Selection(0.05))
    for n in range(100_000):
        data = b"again" if n % 10 == 0 else b"%05d" % n
        counter.add(Piece(data, n, True, False, content_rank(data)))
        assert len(counter._bytes) <= 2 * counter.capacity
    assert set(counter.better().repeated) == {content_rank(b"again")}


@given(text=st.text(min_size=50, max_size=300), fraction=st.floats(0.01, 0.99))
def test_tail_begins_with_a_character(text, fraction):
    kept, held_out = split([text.encode()], f"tail:{fraction}")
    assert "".join(part.decode() for part in kept + held_out) == text


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


COMPRESS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard.compress,
}
SKIPPABLE = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"any"
VALID = {
    "gz": lambda a, b: gzip.compress(a, 0) + gzip.compress(b"") + gzip.compress(b, 9) + bytes(512),
    "gz with a name": lambda a, b: subprocess.run(["gzip", "-c"], input=a + b, stdout=-1, check=True).stdout,
    "xz": lambda a, b: lzma.compress(a, check=lzma.CHECK_SHA256) + bytes(8) + lzma.compress(b),
    "xz of the old form": lambda a, b: lzma.compress(a + b, format=lzma.FORMAT_ALONE),
    "bz2": lambda a, b: bz2.compress(a, 1) + bz2.compress(b, 9),
    "zst": lambda a, b: SKIPPABLE + zstandard.compress(a, 19) + SKIPPABLE + zstandard.compress(b),
    "zst without sizes": lambda a, b: zstandard.ZstdCompressor(
        write_content_size=False, write_checksum=True
    ).compress(a + b),
    "zst of a large window": lambda a, b: long_zstandard(a + b),
}


def long_zstandard(data):
    """As `zstd --long=31` makes it: the window is larger than decompressors allow by themselves."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return writer.compress(data) + writer.flush()


@pytest.mark.parametrize("name", VALID)
def test_valid_compression_of_any_kind_is_read(tmp_path, name):
    path = tmp_path / f"text.{name.split()[0]}"
    a, b = lines(20_000), lines(3000, "more")
    path.write_bytes(VALID[name](a, b))
    assert joined(read_sources([str(path)])) == a + b


@pytest.mark.parametrize("suffix", COMPRESS)
def test_damage_after_the_first_stream_is_named(tmp_path, suffix):
    path = tmp_path / f"text.{suffix}"
    first, second = COMPRESS[suffix](lines(100)), COMPRESS[suffix](lines(200))
    for damaged in (first + second[:-5], first + b"garbage", first + second[:1]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"cannot read .*text\.{suffix}: its compressed data is "):
            read_sources([str(path)])


def test_an_unknown_dictionary_is_named(tmp_path):
    dictionary = zstandard.train_dictionary(4096, [b"sample %d of many" % n for n in range(2000)])
    (tmp_path / "text.zst").write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(lines(100)))
    with pytest.raises(InputError, match=r"text.zst: .*[Dd]ictionary"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_lines_are_rows(tmp_path, suffix):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS) * 1000
    (tmp_path / f"rows.jsonl.{suffix}").write_bytes(COMPRESS[suffix](rows.encode()))
    assert [document.data.decode() for document in read_sources([str(tmp_path)])] == TEXTS * 1000


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_compressed_file_has_no_text(tmp_path, suffix):
    (tmp_path / f"text.{suffix}").touch()
    with pytest.raises(InputError, match="no text in"):
        read_sources([str(tmp_path)])


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


def test_values_beside_the_text_may_be_of_any_size(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": ' + "9" * 10_000 + ', "x": 1e' + "9" * 5000 + ', "text": "one"}\n')
    assert joined(read_sources([str(path)])) == b"one"
    with pytest.raises(InputError, match="line 1: the field n holds int, not text"):
        read_sources([str(path)], "n")


@pytest.mark.parametrize("line", ["[" * 1_000_000, '{"text": ' * 200_000, "[" * 100_000 + "]" * 100_000])
def test_a_line_that_is_nested_deeply_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n' + line)
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 is nested too deeply"):
        read_sources([str(tmp_path)])


@pytest.mark.parametrize("line", [b"\xff\xfe", b'{"text": "\xff"}', b"nothing", b"\0", b'"text"', b"NaN"])
def test_a_line_that_holds_no_row_is_named(tmp_path, line):
    (tmp_path / "rows.jsonl").write_bytes(line)
    with pytest.raises(InputError, match=r"rows.jsonl, line 1 (is not JSON|has no field)"):
        read_sources([str(tmp_path)])


def test_parquet_text_need_not_be_utf8(tmp_path):
    column = pyarrow.array([b"\xff\xfe", b"a"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "rows.parquet")
    assert joined(read_sources([str(tmp_path)])) == b"\xff\xfea"
    for kind in (
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        table = pyarrow.table({"text": pyarrow.array(TEXTS).cast(kind)})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
        assert [document.data.decode() for document in read_sources([str(tmp_path)])] == TEXTS


def test_rows_that_are_none_are_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    with pytest.raises(InputError, match=r"rows.jsonl, line 2 is not JSON"):
        read_sources([str(tmp_path / "rows.jsonl")])
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match=r"rows.parquet is not parquet"):
        read_sources([str(tmp_path / "rows.parquet")])


def test_a_dataset_is_streamed_once_and_again_when_its_folder_changed(tmp_path):
    write_json_lines(tmp_path / "data.jsonl")
    source = f"hf://{tmp_path}"
    assert [document.data.decode() for document in read_sources([source])] == TEXTS
    [kept] = find_files([source])
    written = kept.version()
    assert find_files([source])[0].version() == written
    (tmp_path / "data.jsonl").write_text('{"text": "new"}\n')
    assert [document.data for document in read_sources([source])] == [b"new"]
    kept.path.write_bytes(bytes(kept.size))
    write_json_lines(tmp_path / "data.jsonl")
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
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HOME], env=environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == (
        "/tmp\n" if named else "there is no home folder to keep tokens in; name one with MHESA_CACHE\n"
    )


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
        assert windows.is_stream_start(step) == (step % windows.per_pass == 0)
        if not windows.is_stream_start(step):
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
    with pytest.raises(InputError, match="has 8 tokens, fewer than one window of 8 and the token after it"):
        windows_of(8, context=8)
    with pytest.raises(InputError, match="fewer than 4 streams of a window of 8"):
        windows_of(32, context=8, streams=True)
