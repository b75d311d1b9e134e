"""Scores of streams against whole passes, and streams of every kind."""

import functools
import io
import itertools
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import running
from tiny_models import tiny_model
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import mhesa
from mhesa import GatedExponentialSmoothingLM
from mhesa.data.files import Document
from mhesa.hf import ByteTokenizer
from mhesa.inference.evaluation import evaluate
from mhesa.inference.heatmap import Heatmap
from mhesa.inference.line_scores import LineScores
from mhesa.inference.scoring import BY, END, by_token, line_pieces, score
from mhesa.inference.session import Reader, Session
from mhesa.inference.statistics import STATISTICS
from mhesa.inference.units import UNITS, read_units, surprisal_table, token_units
from mhesa.tokenizers import TextTokenizer, train_bpe
from mhesa.tokenizers.stream import BLOCK_BYTES, encode_stream


@pytest.fixture(scope="module")
def reader():
    return Reader(tiny_model(257), ByteTokenizer())


def by_line(name, batches):
    return LineScores().read(name, line_pieces(batches))


def expected_bits(reader, text):
    ids = torch.tensor([256, *text])
    with torch.no_grad():
        logits = reader.model(ids[None, :-1])[0].double().log_softmax(-1)
    return (-logits[torch.arange(len(text)), ids[1:]] / math.log(2)).numpy()


PARTS = [b"\n", b"a", b"word ", b"\r\n", b"\xff", b"\x00", "é".encode()]


@settings(max_examples=40, deadline=None)
@given(parts=st.lists(st.sampled_from(PARTS), max_size=40))
def test_surprisals_equal_those_of_one_pass(reader, parts):
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


TOKEN_BYTES = [bytes([byte]) for byte in range(256)] + [b""]


def blocks_of(chunks):
    return [
        [block.text for block in blocks] for blocks in encode_stream(ByteTokenizer(), TOKEN_BYTES, chunks)
    ]


@given(parts=st.lists(st.binary(max_size=20), max_size=10))
def test_blocks_are_the_lines_however_they_come(parts):
    assert [block for blocks in blocks_of(parts) for block in blocks] == list(io.BytesIO(b"".join(parts)))


def test_a_line_is_handed_on_as_soon_as_it_ends():
    came = []

    def chunks():
        for chunk in (b"one\ntw", b"o\nth", b"ree"):
            came.append(chunk)
            yield chunk

    blocks = encode_stream(ByteTokenizer(), TOKEN_BYTES, chunks())
    assert [block.text for block in next(blocks)] == [b"one\n"]
    assert came == [b"one\ntw"]
    assert [[block.text for block in together] for together in blocks] == [[b"two\n"], [b"three"]]


# Tokens that span lines

TEXT = "def f(x):\n    if x:\n        return  \n\n\n    # why\r\n\r\n\té\u00a0漢字\u3000 it's 🎉  \n" * 40


def byte_level():
    return train_bpe([TEXT.encode()], 400)


def byte_level_with_prefix():
    tokenizer = byte_level().tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return TextTokenizer(tokenizer)


def without_words():
    """Byte-pair encoding that merges over words and lines alike."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT[i : i + 500] for i in range(0, len(TEXT), 500)], trainer)
    return TextTokenizer(tokenizer)


def sentence_pieces():
    """As Llama's: a space before the text, spaces as ▁, bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return TextTokenizer(tokenizer)


KINDS = [byte_level, byte_level_with_prefix, without_words, sentence_pieces]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def vocabulary(request):
    return request.param()


def token_bytes_of(tokenizer):
    return [tokenizer.decode_bytes([index]) for index in range(len(tokenizer))]


def stream_of(tokenizer, chunks):
    stream = encode_stream(tokenizer, token_bytes_of(tokenizer), chunks)
    return [block for together in stream for block in together]


@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            ["\n", "\n\n", "\r\n", " ", "    ", "\t", "if x:", "return", "it's", "é", "漢", "🎉"]
        ),
        max_size=40,
    ),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=5),
)
def test_a_stream_has_the_tokens_of_the_whole_text(vocabulary, text, cuts):
    data = "".join(text).encode()
    chunks, start = [], 0
    for size in itertools.cycle(cuts):
        chunks.append(data[start : start + size])
        start += size
        if start >= len(data):
            break
    blocks = [
        b for together in encode_stream(vocabulary, token_bytes_of(vocabulary), chunks) for b in together
    ]
    assert b"".join(block.text for block in blocks) == data
    assert [i for block in blocks for i in block.ids.tolist()] == vocabulary.encode_bytes(data).tolist()


def test_a_long_line_has_the_tokens_of_the_whole_text(vocabulary):
    data = ("it's  if x return é 漢字 " * 20_000).encode()
    chunks = [data[start : start + 10_007] for start in range(0, len(data), 10_007)]
    blocks = [
        b for together in encode_stream(vocabulary, token_bytes_of(vocabulary), chunks) for b in together
    ]
    assert all(len(block.text) <= BLOCK_BYTES and block.text.decode() for block in blocks)
    assert [i for block in blocks for i in block.ids.tolist()] == vocabulary.encode_bytes(data).tolist()


def word_pieces():
    words = {"[UNK]": 0, "a": 1, "b": 2, "##c": 3}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return TextTokenizer(tokenizer)


def test_blank_lines_may_have_no_tokens():
    tokenizer = word_pieces()
    reader = Reader(tiny_model(len(tokenizer)), tokenizer)
    chunks = [b"\n", b" \n", b"a b\n", b"\n", b"ac\n \n"]
    rows = list(LineScores().read("x", line_pieces(score(reader, chunks))))
    bits = Session(reader).score("a b\nac\n")
    assert [row.bits for row in rows] == pytest.approx([0, 0, bits[:2].sum(), 0, bits[2:].sum(), 0])
    text = b"".join(chunks).decode()
    assert [row.text for row in surprisal_table(reader, text)] == ["a", "b", "ac"]
    assert [row.surprisal for row in surprisal_table(reader, text, by="token")] == pytest.approx(bits)
    costs = [evaluate(reader.decoder, tokenizer, [Document("x", data)]) for data in (b"\n", b"".join(chunks))]
    assert costs[0].as_dict() == {"loss": 0, "bits_per_byte": 0, "perplexity": 1, "tokens": 0, "bytes": 1}
    assert costs[1].nats == pytest.approx(bits.sum() * math.log(2))


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["metaspace", "prefix", "strip", "word pieces"]),
    text=st.lists(st.sampled_from([b"a", b"b c", b" ", b"\n", "é".encode(), b"zz", b"\xff"]), max_size=12),
)
def test_lines_words_tokens_and_documents_have_one_total(kind, text):
    data, reader = b"".join(text), readers_of_odd_vocabularies()[kind]
    if kind in ("metaspace", "word pieces"):
        data = data.replace(b"\xff", b"")
    batches = list(score(reader, [data], statistics=STATISTICS))
    whole = sum(batch.bits.sum() for batch in batches)
    for by in (by_line, BY["token"], BY["document"]):
        assert sum(row.bits for row in by("x", batches)) == pytest.approx(whole)
    assert sum(block.sizes.sum() for batch in batches for block in batch.blocks if len(block.ids)) == sum(
        len(block.text) for batch in batches for block in batch.blocks if len(block.ids)
    )
    assert sum(row.surprisal for row in token_units("x", batches)) == pytest.approx(whole)
    characters = read_units("x", [*batches, END], UNITS["character"])
    assert sum(row.surprisal for row in characters) == pytest.approx(whole)


@functools.cache
def readers_of_odd_vocabularies():
    """Vocabularies that put a space before a text, or change it."""
    found = {}
    for kind in ("metaspace", "prefix", "strip", "word pieces"):
        tokenizer = tokenizers.Tokenizer(
            models.WordPiece(unk_token="[UNK]") if kind == "word pieces" else models.BPE(unk_token="[UNK]")
        )
        trainer = trainers.BpeTrainer(special_tokens=["[UNK]"], vocab_size=300, show_progress=False)
        if kind == "metaspace":
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        elif kind == "word pieces":
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]"], vocab_size=60, show_progress=False)
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                special_tokens=["[UNK]"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                vocab_size=300,
                show_progress=False,
            )
            if kind == "strip":
                tokenizer.normalizer = normalizers.Strip()
        tokenizer.train_from_iterator(["a b c a b cc the zz\n"] * 5, trainer)
        vocabulary = TextTokenizer(tokenizer)
        found[kind] = Reader(tiny_model(len(vocabulary)), vocabulary)
    return found


@pytest.mark.parametrize("cut", range(12))
def test_a_character_that_is_cut_after_a_line_end_is_no_error(cut):
    data = "ab\n漢 b\n".encode()
    blocks = stream_of(word_pieces(), [data[:cut], data[cut:]])
    assert [(block.text, block.ids.tolist()) for block in blocks] == [
        (b"ab\n", [0]),
        ("漢 b\n".encode(), [0, 2]),
    ]


def test_a_vocabulary_that_gives_no_text_back_goes_by_lines():
    blocks = stream_of(word_pieces(), [b"A b\nac  a"])
    assert [(block.text, block.ids.tolist()) for block in blocks] == [
        (b"A b\n", [1, 2]),
        (b"ac  a", [1, 3, 1]),
    ]


@pytest.fixture(scope="module")
def line_spanning():
    tokenizer = byte_level()
    assert any(b"\n" in token[:-1] for token in token_bytes_of(tokenizer))
    # Wider than the tokenizer, as `pad_to_multiple_of` makes it.
    return Reader(tiny_model(448), tokenizer)


@pytest.mark.parametrize("chunk", [1, 7, 1000, 10**6])
def test_score_and_eval_agree_where_tokens_span_lines(line_spanning, chunk):
    data = TEXT.encode()
    chunks = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    expected = evaluate(line_spanning.decoder, line_spanning.tokenizer, [Document("t", data)])
    session = Session(line_spanning).score(data)
    for by in (by_line, *BY.values()):
        scored = list(by("t", score(line_spanning, chunks)))
        assert sum(one.bits for one in scored) / len(data) == pytest.approx(expected.bits_per_byte, abs=1e-4)
        assert sum(one.bits for one in scored) == pytest.approx(session.sum(), rel=1e-4)
    lines = list(by_line("t", score(line_spanning, chunks)))
    assert [line.text for line in lines] == list(io.BytesIO(data))
    assert [line.offset for line in lines] == np.cumsum([0, *(line.size for line in lines)])[:-1].tolist()


def test_a_token_that_spans_lines_is_shared_out_by_bytes(line_spanning):
    data = b"return\n\n\n    if x:\n"
    bits = line_spanning.tokenizer.encode_bytes(data), Session(line_spanning).score(data)
    expected, place = np.zeros(len(list(io.BytesIO(data)))), 0
    line_of = np.repeat(np.arange(len(expected)), [len(line) for line in io.BytesIO(data)])
    for token, cost in zip(*(values.tolist() for values in bits), strict=True):
        size = len(line_spanning.tokenizer.decode_bytes([token]))
        for byte in range(place, place + size):
            expected[line_of[byte]] += cost / size
        place += size
    lines = list(by_line("t", score(line_spanning, [data])))
    np.testing.assert_allclose([line.bits for line in lines], expected, rtol=1e-5)


def test_the_server_shares_tokens_out_as_score_does(tmp_path):
    torch.manual_seed(0)
    tokenizer = byte_level()
    model = GatedExponentialSmoothingLM(
        num_tokens=len(tokenizer), dim=16, depth=2, heads=2, dim_mhesa=8
    ).eval()
    mhesa.save(model, tokenizer, tmp_path / "model")
    data = "return\n\n\n    if x:\n  é"
    expected = list(by_line("t", score(Reader(model, tokenizer), [data.encode()])))
    with running(tmp_path / "model", tmp_path / "log") as server, server.client() as client:
        [answer] = client.post("/v1/score", json={"input": data, "by": "line"}).json()["data"]
        [whole] = client.post("/v1/score", json={"input": data, "by": "text"}).json()["data"]
    assert [item["text"] for item in answer["items"]] == data.splitlines(keepends=True)
    bits = [line.bits for line in expected]
    np.testing.assert_allclose([item["bits"] for item in answer["items"]], bits, atol=1e-4)
    assert [item["bits"] for item in whole["items"]] == [pytest.approx(sum(bits), abs=1e-4)]


def test_a_line_that_is_too_long_to_hold_is_one_line(reader):
    text = b"x" * (3 * BLOCK_BYTES + 5) + b"\nnext"
    first, second = by_line("t", score(reader, [text]))
    assert (first.size, first.number, len(first.text)) == (3 * BLOCK_BYTES + 6, 1, 1024)
    assert (second.text, second.offset) == (b"next", 3 * BLOCK_BYTES + 6)
    bits = expected_bits(reader, text)
    assert first.bits == pytest.approx(bits[: first.size].sum(), rel=1e-5)


def test_empty_text_has_no_lines(reader):
    assert list(by_line("t", score(reader, []))) == []
    (document,) = BY["document"]("t", score(reader, []))
    assert (document.bits, document.bits_per_byte) == (0, 0)


def test_heatmap_escapes_the_text(reader):
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

    text = (
        "\n\n<script>alert('&amp;')</script> Größe \U0001f600\u200d\xa0\u3000\xad\r\n1\r2\x1b[31m".encode()
        + b"\xff end"
    )
    file, page = io.StringIO(), Page()
    batches = Heatmap(file).follow("<b>name</b>", score(reader, [text[:40], text[40:]]))
    assert sum(len(block.text) for batch in batches for block in batch.blocks) == len(text)
    page.feed(file.getvalue())
    plain = text.decode("utf-8", "replace").replace("\r\n", "\n")
    # A browser leaves out the line end that a <pre> begins with.
    assert page.shown == "\n" + re.sub("[\r\x1b]", "\N{REPLACEMENT CHARACTER}", plain)
    assert page.tags <= {"html", "meta", "title", "style", "h1", "h2", "p", "i", "pre", "span"}
    assert "http" not in file.getvalue()


PEAK = """
import resource, sys, torch
from mhesa import GatedExponentialSmoothingLM
from mhesa.hf import ByteTokenizer
from mhesa.inference.line_scores import LineScores
from mhesa.inference.scoring import line_pieces, score
from mhesa.inference.session import Reader
model = GatedExponentialSmoothingLM(num_tokens=257, dim=8, depth=1, heads=1, dim_mhesa=8).eval()
chunks = (b"\\x00\\xffy " * 16384 for _ in range(int(sys.argv[1])))
(line,) = LineScores().read("-", line_pieces(score(Reader(model, ByteTokenizer()), chunks)))
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
