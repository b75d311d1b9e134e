"""Reading, holding out and windowing text."""

import io
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhesa.data import Document, Holdout, Windows, read_sources, standard_library, tokenize
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


def test_dash_is_standard_input(texts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped \xff")))
    assert joined(read_sources([str(texts / "b.txt"), "-"])) == b"secondpiped \xff"


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


def test_tail_is_the_end_of_the_corpus():
    documents = [Document("a", bytes(700)), Document("b", b"x" * 300)]
    kept, held_out = Holdout("tail", 0.1).split(documents)
    assert joined(held_out) == b"x" * 100
    assert joined(kept) == bytes(700) + b"x" * 200


@given(
    texts=st.lists(st.binary(min_size=1, max_size=5000), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.9),
    method=st.sampled_from(["content", "tail"]),
)
def test_nothing_is_lost_and_nothing_is_on_both_sides(texts, fraction, method):
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    try:
        kept, held_out = Holdout(method, fraction).split(documents)
    except InputError:
        return
    assert len(joined(kept)) + len(joined(held_out)) == sum(map(len, texts))
    assert joined(kept)
    assert joined(held_out)


def test_content_decides_and_not_names_or_order():
    a, b = lines(20_000), lines(20_000, "other")
    sides = []
    for documents in ([Document("a", a), Document("b", b)], [Document("x", b), Document("y", a)]):
        kept, held_out = Holdout("content", 0.1).split(documents)
        sides.append((sorted(d.data for d in kept), sorted(d.data for d in held_out)))
    assert sides[0] == sides[1]
    share = sum(map(len, sides[0][1])) / (len(a) + len(b))
    assert 0.03 < share < 0.2


def test_equal_pieces_fall_on_one_side():
    document = lines(40_000)
    kept, held_out = Holdout("content", 0.1).split([Document("a", document), Document("copy", document)])
    training = joined(kept)
    assert all(piece.data not in training for piece in held_out)


def test_pieces_end_with_lines():
    _, held_out = Holdout("content", 0.1).split([Document("a", lines(40_000))])
    assert all(piece.data.startswith(b"line ") and piece.data.endswith(b"\n") for piece in held_out)


@pytest.mark.parametrize(
    "text", ["", "tail", "tail:0", "tail:1", "tail:nan", "tail:x", "head:0.1", "content:-1"]
)
def test_a_holdout_that_cannot_be_is_refused(text):
    with pytest.raises(InputError, match="holdout must be"):
        Holdout.parse(text)


def test_a_corpus_of_one_piece_is_refused():
    with pytest.raises(InputError, match="too small to hold text out"):
        Holdout("content", 0.05).split([Document("a", b"short")])


# Windows


def test_documents_are_parted_by_end_of_text():
    ids = tokenize([Document("a", b"ab"), Document("b", b"\xff")], ByteTokenizer())
    assert ids.tolist() == [256, 97, 98, 256, 255]


@given(length=st.integers(8, 300), context=st.integers(1, 8), seed=st.integers(0, 3))
def test_a_pass_visits_no_token_twice(length, context, seed):
    windows = Windows(np.arange(length), context=context, seed=seed, length=10**9)
    for nth in range(3):
        ids = [windows[nth * windows.per_pass + index]["input_ids"] for index in range(windows.per_pass)]
        seen = np.concatenate(ids)
        assert len(set(seen.tolist())) == len(seen) == windows.per_pass * context
        assert length - len(seen) < 2 * context
        assert all((np.diff(window) == 1).all() for window in ids)


def test_position_and_seed_decide_a_window():
    tokens = np.arange(1000)
    one, other, third = (Windows(tokens, context=10, seed=seed, length=10**9) for seed in (1, 1, 2))
    backwards = [other[index]["input_ids"].tolist() for index in reversed(range(300))][::-1]
    assert [one[index]["input_ids"].tolist() for index in range(300)] == backwards
    assert [third[index]["input_ids"].tolist() for index in range(300)] != backwards


def test_passes_differ_in_offset_and_order():
    windows = Windows(np.arange(1000), context=10, seed=0, length=10**9)
    first, second = (
        [windows[nth * windows.per_pass + index]["input_ids"][0].item() for index in range(windows.per_pass)]
        for nth in range(2)
    )
    assert first[0] % 10 != second[0] % 10
    assert np.argsort(first).tolist() != np.argsort(second).tolist()


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="has 5 tokens, fewer than one window of 8"):
        Windows(np.arange(5), context=8, seed=0, length=1)
