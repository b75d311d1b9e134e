"""Texts read while they grow: whole characters, and never a piece of what ends them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mhesa.inference.sampling import TokenSampler
from mhesa.serve.engine.text import Choice, Reader, Vocabulary

PIECES = [*(bytes([byte]) for byte in range(256)), b"ab", b"aba", "né".encode(), b""]
END = len(PIECES) - 1
VOCABULARY = Vocabulary(PIECES, END)
TOKENS = st.lists(st.one_of(st.sampled_from(b"abn"), st.integers(0, END)), max_size=40)
STOPS = st.lists(st.text("abné", min_size=1, max_size=4).map(str.encode), max_size=3)


def write(tokens, stops=(), limit=1000, reads=()):
    """Write tokens and read in between; the pieces that were read."""
    choice = Choice(VOCABULARY, TokenSampler(), limit, stops, top=None)
    reader, read = Reader(choice), []
    for index, token in enumerate(tokens):
        if choice.take(token):
            break
        if index in reads:
            read.append(reader.read()[0])
    else:
        choice.finish = choice.finish or "length"
    read.append(reader.read()[0])
    return choice, read


@given(TOKENS, STOPS, st.integers(1, 40), st.sets(st.integers(0, 40)))
def test_a_text_is_what_comes_before_its_first_ending(tokens, stops, limit, reads):
    choice, read = write(tokens, stops, limit, reads)
    whole = b""
    for token in tokens[:limit]:
        if token == END:
            break
        whole += PIECES[token]
        if any(stop in whole for stop in stops):
            whole = whole[: min(whole.index(stop) for stop in stops if stop in whole)]
            break
    assert bytes(choice.data) == whole
    assert "".join(read) == whole.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["né", "日本語", "🙂 ok", "e\u0301"])
def test_characters_cut_by_tokens_come_whole(text):
    data = text.encode()
    _, read = write(data, reads=range(len(data)))
    assert "".join(read) == text
    assert "\ufffd" not in "".join(read)


def test_what_may_become_an_ending_is_held_back():
    choice = Choice(VOCABULARY, TokenSampler(), 100, (b"\n\nUser:",))
    reader = Reader(choice)
    for byte in b"hello\n\nUse":
        choice.take(byte)
    assert reader.read()[0] == "hello"
    choice.take(ord("d"))
    assert reader.read()[0] == "\n\nUsed"


def test_a_limit_of_nothing_is_finished_at_once():
    assert Choice(VOCABULARY, TokenSampler(), 0).finish == "length"
