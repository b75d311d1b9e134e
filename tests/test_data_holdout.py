"""Holding text out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import lines, tokens_of

from mhesa.data.corpus import Source
from mhesa.data.holdout import Holdout, Piece, PieceCounter, Selection, content_rank, cut
from mhesa.errors import InputError


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
def test_every_byte_is_on_one_side(texts, fraction, method):
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


def test_repeated_pieces_are_found_in_bounded_memory():
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
def test_an_invalid_holdout_is_refused(text):
    with pytest.raises(InputError, match="holdout must be"):
        Holdout.parse(text)
