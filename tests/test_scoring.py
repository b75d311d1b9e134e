"""Scores of streams against whole passes, and streams of every kind."""

import io
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mhesa import GatedExponentialSmoothingLM
from mhesa.hf import ByteTokenizer
from mhesa.inference.heatmap import Heatmap
from mhesa.inference.scoring import BY, MAX_PIECE, by_line, by_token, most_surprising, pieces_of, score
from mhesa.inference.session import Reader


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8)
    return Reader(model.eval(), ByteTokenizer())


def expected_bits(reader, text):
    ids = torch.tensor([256, *text])
    with torch.no_grad():
        logits = reader.model(ids[None, :-1])[0].double().log_softmax(-1)
    return (-logits[torch.arange(len(text)), ids[1:]] / math.log(2)).numpy()


PARTS = [b"\n", b"a", b"word ", b"\r\n", b"\xff", b"\x00", "é".encode()]


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=40))
def test_lines_and_tokens_cost_what_one_pass_costs(reader, parts):
    text = b"".join(parts)
    bits = expected_bits(reader, text) if text else np.zeros(0)
    tokens = list(by_token("t", score(reader, parts)))
    np.testing.assert_allclose([token.bits for token in tokens], bits, atol=1e-4)
    assert b"".join(token.text for token in tokens) == text
    lines = list(by_line("t", score(reader, parts)))
    assert b"".join(line.text for line in lines) == text
    assert [line.text for line in lines] == list(io.BytesIO(text))
    for line in lines:
        assert line.bits == pytest.approx(bits[line.offset : line.offset + line.size].sum(), abs=1e-3)
    (document,) = BY["document"]("t", score(reader, parts))
    assert document.bits == pytest.approx(bits.sum(), abs=1e-3)
    assert document.size == len(text)


@given(parts=st.lists(st.binary(max_size=20), max_size=10))
def test_pieces_are_the_lines_however_they_come(parts):
    pieces = [piece for batch in pieces_of(parts) for piece in batch]
    assert pieces == list(io.BytesIO(b"".join(parts)))


def test_a_line_is_handed_on_as_soon_as_it_ends():
    came = []

    def chunks():
        for chunk in (b"one\ntw", b"o\nth", b"ree"):
            came.append(chunk)
            yield chunk

    pieces = pieces_of(chunks())
    assert next(pieces) == [b"one\n"]
    assert came == [b"one\ntw"]
    assert next(pieces) == [b"two\n"]
    assert list(pieces) == [[b"three"]]


def test_a_line_that_is_too_long_to_hold_is_one_line(reader):
    text = b"x" * (3 * MAX_PIECE + 5) + b"\nnext"
    first, second = by_line("t", score(reader, [text]))
    assert (first.size, first.number, len(first.text)) == (3 * MAX_PIECE + 6, 1, 1024)
    assert (second.text, second.offset) == (b"next", 3 * MAX_PIECE + 6)
    bits = expected_bits(reader, text)
    assert first.bits == pytest.approx(bits[: first.size].sum(), rel=1e-5)


def test_the_most_surprising_come_first(reader):
    lines = list(by_line("t", score(reader, [b"aa\nzzzzz\nb\n\xff\xfe\xfd\xfc\n"])))
    top = most_surprising(iter(lines), 2)
    assert [line.bits for line in top] == sorted((line.bits for line in lines), reverse=True)[:2]


def test_nothing_has_no_lines(reader):
    assert list(by_line("t", score(reader, []))) == []
    (document,) = BY["document"]("t", score(reader, []))
    assert (document.bits, document.bits_per_byte) == (0, 0)


def test_the_page_shows_the_text_and_nothing_else_of_it(reader):
    from html.parser import HTMLParser

    class Page(HTMLParser):
        tags, shown, inside = set(), "", False

        def handle_starttag(self, tag, attributes):
            self.tags.add(tag)
            self.inside = self.inside or tag == "pre"

        def handle_endtag(self, tag):
            self.inside = self.inside and tag != "pre"

        def handle_data(self, data):
            if self.inside:
                self.shown += data

    text = "<script>alert('&amp;')</script> Größe \U0001f600\n\x1b[31m".encode() + b"\xff end"
    file, page = io.StringIO(), Page()
    batches = Heatmap(file).follow("<b>name</b>", score(reader, [text[:40], text[40:]]))
    assert sum(len(piece) for batch in batches for piece in batch.pieces) == len(text)
    page.feed(file.getvalue())
    assert page.shown == text.decode("utf-8", "replace").replace("\x1b", "\N{REPLACEMENT CHARACTER}")
    assert page.tags <= {"html", "meta", "title", "style", "h1", "h2", "p", "i", "pre", "span"}
    assert "http" not in file.getvalue()


PEAK = """
import resource, sys, torch
from mhesa import GatedExponentialSmoothingLM
from mhesa.hf import ByteTokenizer
from mhesa.inference.scoring import by_line, score
from mhesa.inference.session import Reader
model = GatedExponentialSmoothingLM(num_tokens=257, dim=8, depth=1, heads=1, dim_mhesa=8).eval()
chunks = (b"\\x00\\xffy " * 16384 for _ in range(int(sys.argv[1])))
(line,) = by_line("-", score(Reader(model, ByteTokenizer()), chunks))
print(line.size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(chunks):
    """Bytes that a process needed at most to score a line of so many chunks of 64 KB."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(chunks)], capture_output=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size == chunks << 16
    return peak * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.torture
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_a_line_of_100_mb():
    # Allocators keep some megabytes more or less for some time; the text alone would be 100.
    assert peak_memory(1600) - peak_memory(80) < 16e6
