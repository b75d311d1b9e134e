"""Texts as they are written: stop strings, whole characters, limits."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mhesa.errors import InputError
from mhesa.inference.continuation import Continuation, TextCursor
from mhesa.inference.sampling import TokenSampler
from mhesa.inference.stop_strings import StopMatcher

PIECES = [*(bytes([byte]) for byte in range(256)), b"ab", b"aba", "né".encode(), b""]
END = len(PIECES) - 1
TOKENS = st.lists(st.one_of(st.sampled_from(b"abn"), st.integers(0, END)), max_size=40)
STOPS = st.lists(st.text("abné", min_size=1, max_size=4).map(str.encode), max_size=3)


def new(limit, stops=(), pieces=PIECES):
    """A text to write, and its cursor."""
    text = Continuation(TokenSampler(), limit, end=len(pieces) - 1, decode=pieces.__getitem__, stops=stops)
    return text, TextCursor(text)


def write(tokens, stops=(), limit=1000, reads=(), pieces=PIECES):
    """Write tokens and read in between; the text, and what was read of it."""
    tokens = tokens[:limit]
    text, cursor = new(min(limit, len(tokens)), stops, pieces)
    read = []
    for index, token in enumerate(tokens):
        text.take(token)
        if text.finish:
            break
        if index in reads:
            read.append(cursor.read()[0])
    read.append(cursor.read()[0])
    assert cursor.finish == text.finish is not None
    return text, read


@settings(deadline=None)
@given(TOKENS, STOPS, st.integers(1, 40), st.sets(st.integers(0, 40)))
def test_a_text_is_cut_at_its_first_ending(tokens, stops, limit, reads):
    _, read = write(tokens, stops, limit, reads)
    whole = b""
    for token in tokens[:limit]:
        if token == END:
            break
        whole += PIECES[token]
        if any(stop in whole for stop in stops):
            whole = whole[: min(whole.index(stop) for stop in stops if stop in whole)]
            break
    assert "".join(read) == whole.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["né", "日本語", "🙂 ok", "e\u0301"])
def test_characters_cut_by_tokens_come_whole(text):
    data = text.encode()
    _, read = write(data, reads=range(len(data)))
    assert "".join(read) == text
    assert "\ufffd" not in "".join(read)


def test_a_piece_of_several_characters_comes_with_their_last_byte():
    parts = ["é".encode()[:1], "é".encode()[1:], "日本".encode()[:4], "日本".encode()[4:], b"\xff", b"x", b""]
    _, read = write(range(6), reads=range(6), pieces=parts)
    assert [part for part in read if part] == ["é", "日", "本", "\N{REPLACEMENT CHARACTER}", "x"]


def test_the_beginning_of_a_stop_is_held_back():
    text, cursor = new(100, (b"\n\nUser:",))
    for byte in b"hello\n\nUse":
        text.take(byte)
    assert cursor.read()[0] == "hello"
    text.take(ord("d"))
    assert cursor.read()[0] == "\n\nUsed"


def test_a_limit_of_zero_finishes_at_once():
    assert new(0)[0].finish == "length"


@pytest.mark.parametrize("limit", [-1, 2.5, float("nan"), "3"])
def test_a_limit_that_is_no_whole_number_is_refused(limit):
    with pytest.raises(InputError, match=f"must be a whole number, 0 or more, not {limit}"):
        new(limit)


def test_logits_that_are_no_numbers_are_an_error():
    text, _ = new(9)
    text.take(-1)
    assert isinstance(text.error, FloatingPointError)
    assert text.finish is None


def matched(pieces, stops):
    """What comes of pieces up to a stop."""
    matcher, out = StopMatcher(stops), []
    for piece in pieces:
        out.append(matcher.feed(piece))
        if matcher.stopped:
            return out
    return [*out, matcher.flush()]


@settings(deadline=None)
@given(
    text=st.binary(max_size=30),
    stops=st.lists(st.binary(min_size=1, max_size=3), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_a_text_is_cut_at_its_first_stop(text, stops, cuts):
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    # The stop that is whole first ends the text, wherever its pieces were cut.
    ends = (end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops)))
    end = next(ends, None)
    longest = max((len(stop) for stop in stops if text[:end].endswith(stop)), default=0)
    assert b"".join(matched(pieces, stops)) == (text if end is None else text[: end - longest])


@pytest.mark.parametrize("text", [b"aab" * 40 + b"aaaac", b"abab" * 30 + b"abc", b"a" * 90])
def test_stops_that_repeat_themselves_are_held_back_as_far_as_they_match(text):
    stops = [b"aabaabaaaac", b"a" * 70 + b"b", b"ababababc", b"aaaaa" * 20]
    matcher, out = StopMatcher(stops), b""
    for end in range(1, len(text) + 1):
        out += matcher.feed(text[end - 1 : end])
        if matcher.stopped:
            assert out == text[: text.index(next(stop for stop in stops if stop in text))]
            break
        lengths = (size for stop in stops for size in range(len(stop)) if text[:end].endswith(stop[:size]))
        assert out == text[: end - max(lengths)]


def test_text_that_cannot_become_a_stop_is_passed_on():
    assert StopMatcher([b"xx"]).feed(b"abc") == b"abc"


def test_an_empty_stop_is_refused():
    with pytest.raises(InputError, match="empty"):
        StopMatcher([b"a", b""])
