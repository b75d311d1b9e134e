"""Tables of surprisal: words, tokens, characters, sentences."""

import json
import math

import numpy as np
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_tiny_model, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mhesa import Reader
from mhesa.errors import InputError
from mhesa.inference import units
from mhesa.inference.scoring import score
from mhesa.inference.units import Columns, GivenWords, data_frame, surprisal_table
from mhesa.tokenizers import Bytes, TextTokenizer, train_bpe

TEXT = "The cat, who was small, sat on the mat.  It slept!\nWhy? Nobody knew why it did"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def reader(request):
    tokenizer = Bytes() if request.param == "bytes" else train_bpe([TEXT.encode()] * 9, 300)
    return Reader(tiny_model(len(tokenizer)), tokenizer)


def predictions(reader):
    """The tokens of the text, where each ends, and the log-probabilities of what follows each in fp64."""
    ids = reader.tokenizer.encode_bytes(TEXT.encode()).astype(int)
    read = torch.tensor([[reader.tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        logprobs = reader.model(read)[0].double().log_softmax(-1).numpy()
    return ids, np.cumsum([len(reader.token_bytes[token]) for token in ids]), logprobs


def test_a_word_costs_the_sum_of_its_tokens(reader):
    ids, ends, logprobs = predictions(reader)
    rows = surprisal_table(reader, TEXT, unit="nats", spill=2)
    assert [row.text for row in rows] == TEXT.split()
    own = -logprobs[np.arange(len(ids)), ids]
    cumulated = dict(zip([0, *ends.tolist()], [0.0, *np.cumsum(own)], strict=True))
    start = 0
    for place, row in enumerate(rows):
        end = row.offset + row.size
        assert TEXT[row.offset : end] == row.text
        assert row.surprisal == pytest.approx(cumulated[end] - cumulated[start], abs=1e-4)
        token = int(np.searchsorted(ends, row.offset, side="right"))
        values = logprobs[token]
        assert row.entropy == pytest.approx(-(np.exp(values) * values).sum(), abs=1e-4)
        assert row.rank == 1 + (values > values[ids[token]]).sum()
        assert row.before == tuple(rows[place - k].surprisal if place >= k else None for k in (1, 2))
        start = end


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("words", [None, ["one", "two"]])
def test_whitespace_of_any_length_is_part_of_the_next_word(monkeypatch, correct, words):
    reader = Reader(tiny_model(257), Bytes())
    text = "one " + " \n\t" * 50 + "two"
    expected = surprisal_table(reader, text, correct=correct, words=words)
    monkeypatch.setattr(units, "LONGEST", 20)
    held = []
    drop = units._Held.drop
    monkeypatch.setattr(units._Held, "drop", lambda self, size: (drop(self, size), held.append(self.text)))
    batches = score(
        reader,
        (letter.encode() for letter in text),
        statistics=Columns(correct=correct).statistics(reader),
        with_end=True,
    )
    segmenter = units.find_words if words is None else GivenWords(words)
    found = list(units.read_units("text", batches, segmenter, Columns(correct=correct)))
    assert max(map(len, held)) <= 21
    assert [(row.text, row.offset) for row in found] == [("one", 0), ("two", 154)]
    assert [row.surprisal for row in found] == pytest.approx([row.surprisal for row in expected], rel=1e-5)


def test_no_unit_is_cut_where_much_text_comes_at_once(monkeypatch):
    monkeypatch.setattr(units, "LONGEST", 30)
    text = "some words here. and a sentence of more words. " * 9
    reader = Reader(tiny_model(257), Bytes())
    for by in ("word", "sentence"):
        found = [row.text for row in surprisal_table(reader, text, by=by)]
        assert found == [text[start:end] for start, end in units.UNITS[by](text, True)]


# The definition in one pattern, which takes the square of a text without ends.
END = r"[\p{STerm}…]+[\p{Pe}\p{Pf}\"']*(?=\s)|[\p{STerm}--[!-~]]+[\p{Pe}\p{Pf}]*|(?=\n\s*\n)"


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("ab.!?…。\uff01」)\"' \n\t\u2028"), max_size=40), st.booleans())
def test_sentences_are_those_of_the_definition(text, is_last):
    expected = [match.span() for match in regex.finditer(rf"(?V1)\S(?s:.)*?(?:{END})", text)]
    rest = text[expected[-1][1] if expected else 0 :]
    if is_last and rest.strip():
        expected.append((len(text) - len(rest.lstrip()), len(text.rstrip())))
    assert units.find_sentences(text, is_last) == expected


@pytest.mark.parametrize("name", ["metaspace", "prefix", "word pieces"])
def test_tokens_are_where_they_are_in_the_text(name):
    """Of vocabularies that put a space before every text, or hold no spaces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]") if name == "word pieces" else models.BPE())
    if name == "word pieces":
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]"], vocab_size=60, show_progress=False)
    else:
        metaspace = name == "metaspace"
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(add_prefix_space=True)
        )
        tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    text = "the cat sat on the mat, and the cat slept"
    tokenizer.train_from_iterator([text], trainer)
    vocabulary = TextTokenizer(tokenizer)
    reader = Reader(tiny_model(len(vocabulary)), vocabulary)
    rows = surprisal_table(reader, text, by="token")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    assert len(rows) == len(encoding.ids)
    assert [row.offset + row.size for row in rows][-1] == len(text)
    for row, (_, end) in zip(rows, encoding.offsets, strict=True):
        assert row.offset + row.size == end
    ids = torch.tensor([[vocabulary.eos_token_id, *encoding.ids]])
    with torch.no_grad():
        logprobs = reader.model(ids)[0].double().log_softmax(-1) / -math.log(2)
    own = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    words = surprisal_table(reader, text)
    assert [row.text for row in words] == text.split()
    for row in words:
        inside = [
            cost
            for cost, (_, end) in zip(own, encoding.offsets, strict=True)
            if row.offset < end <= row.offset + row.size
        ]
        assert row.surprisal == pytest.approx(sum(inside), abs=1e-4)


def test_tokens_have_the_columns_of_words(reader):
    ids, ends, logprobs = predictions(reader)
    rows = surprisal_table(reader, TEXT, by="token", spill=1)
    assert "".join(row.text for row in rows) == TEXT
    assert [row.offset + row.size for row in rows] == ends.tolist()
    own = -logprobs[np.arange(len(ids)), ids] / np.log(2)
    assert [row.surprisal for row in rows] == pytest.approx(own, abs=1e-4)
    assert [row.before[0] for row in rows] == [None, *(row.surprisal for row in rows[:-1])]
    likelier = (logprobs[:-1] > logprobs[np.arange(len(ids)), ids][:, None]).sum(1)
    assert [row.rank for row in rows] == (1 + likelier).tolist()
    expected = -(np.exp(logprobs) * logprobs).sum(1)[:-1] / np.log(2)
    assert [row.entropy for row in rows] == pytest.approx(expected, abs=1e-4)
    [first, *_] = surprisal_table(reader, TEXT, by="token", skip_first=True, spill=1)
    assert (first.number, first.before) == (2, (None,))


def test_the_end_of_a_word_is_counted_with_it(reader):
    _, ends, logprobs = predictions(reader)
    starts = [i for i, token in enumerate(reader.token_bytes) if token[:1].isspace()]
    boundary = -np.log2(np.exp(logprobs[:, [*starts, reader.tokenizer.eos_token_id]]).sum(1))
    before = dict(zip([0, *ends.tolist()], boundary, strict=True))
    plain, corrected = (surprisal_table(reader, TEXT, correct=correct) for correct in (False, True))
    start = 0
    for number, (one, other) in enumerate(zip(plain, corrected, strict=True)):
        end = one.offset + one.size
        expected = one.surprisal + before[end] - (before[start] if number else 0)
        assert other.surprisal == pytest.approx(expected, abs=1e-4)
        start = end


def test_characters_sentences_and_given_words(reader):
    characters = surprisal_table(reader, "e\u0301a漢", by="character")
    assert [(row.text, row.offset) for row in characters] == [("e\u0301", 0), ("a", 3), ("漢", 4)]
    sentences = surprisal_table(reader, TEXT, by="sentence", skip_first=True)
    assert [row.text for row in sentences] == ["It slept!", "Why?", "Nobody knew why it did"]
    words = ["The", "cat", ",", "who"]
    rows = surprisal_table(reader, "The cat, who", words=words)
    assert [row.text for row in rows] == words
    for wrong, message in ((["The", "dog"], "word 2 is 'dog'"), (["The"], "the words end")):
        with pytest.raises(InputError, match=message):
            surprisal_table(reader, "The cat, who", words=wrong)
    with pytest.raises(InputError, match="words needs by='word'"):
        surprisal_table(reader, "The cat", by="token", words=words)
    with pytest.raises(InputError, match="word 2 is 'cat'"):
        GivenWords(["The", "cat"])("The", True)
    assert surprisal_table(reader, "") == []


def test_tables_have_a_header_and_exact_offsets(run, folder):
    data = "One\u00e9 two\tthree\n".encode()
    code, out, _ = run("score", folder, "--by", "word", "--tsv", "--spill", 1, "--unit", "nats", data=data)
    header, *rows = [line.split("\t") for line in out.decode().splitlines()]
    assert (code, header) == (
        0,
        ["source", "number", "offset", "bytes", "text", "nats", "entropy", "rank", "nats_1"],
    )
    assert [(row[2], row[3], row[4]) for row in rows] == [
        ("0", "5", "One\u00e9"),
        ("6", "3", "two"),
        ("10", "5", "three"),
    ]
    assert [row[-1] for row in rows] == ["", rows[0][5], rows[1][5]]


@pytest.mark.parametrize("by", ["word", "character"])
def test_top_shows_the_units_that_cost_most(run, folder, by):
    rows = run("score", folder, "--by", by, "--json", data=TEXT.encode())[1].splitlines()
    top = run("score", folder, "--by", by, "--json", "--top", 3, data=TEXT.encode())[1].splitlines()
    assert top == sorted(rows, key=lambda row: -json.loads(row)["bits"])[:3]


def test_a_unit_of_surprisal_makes_a_table_of_tokens(run, folder):
    bits, nats = (
        run("score", folder, "--by", "token", "--unit", unit, data=b"ab")[1] for unit in ("bits", "nats")
    )
    for one, other in zip(bits.splitlines(), nats.splitlines(), strict=True):
        # Surprisal, entropy, rank, number, text
        assert len(one.split()) == len(other.split()) == 5
        assert float(other.split()[0]) == pytest.approx(float(one.split()[0]) * math.log(2), abs=0.02)


def test_a_table_of_tokens(run, folder):
    code, out, _ = run("score", folder, "--by", "token", "--tsv", data=b"a\n")
    header, *rows = [line.split("\t") for line in out.decode().splitlines()]
    assert (code, header[2:5], [row[2:5] for row in rows]) == (
        0,
        ["offset", "bytes", "text"],
        [["0", "1", "a"], ["1", "1", "\\n"]],
    )


def test_a_data_frame_has_the_same_rows(reader):
    pandas = pytest.importorskip("pandas")
    frame = data_frame(surprisal_table(reader, TEXT, spill=1))
    assert isinstance(frame, pandas.DataFrame)
    assert frame["text"].tolist() == TEXT.split()
    assert frame["bits_1"].tolist()[1:] == frame["bits"].tolist()[:-1]
