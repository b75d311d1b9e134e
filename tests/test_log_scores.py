"""`mhesa score` on logs: sessions by key, masks, alarms, what survives a kill; and tables of words."""

import json
import math
import random
import re
import signal
import tracemalloc

import numpy as np
import pytest
import torch
from commands import StartedCommand, run_on_a_small_disk
from hypothesis import given
from hypothesis import strategies as st

import mhesa
from mhesa import GatedExponentialSmoothingLM, Reader, Session
from mhesa.errors import InputError
from mhesa.inference.line_scores import FalseAlarms, LineScores, most_surprising_span
from mhesa.inference.lines import Masks, Piece, split_lines
from mhesa.inference.scoring import SHOWN_BYTES, ScoredPiece
from mhesa.inference.units import GivenWords, data_frame, surprisal_table
from mhesa.tokenizers import Bytes, train_bpe

LOG = b"".join(b"12:00:%02d user=%d did thing %d\n" % (i % 60, i % 3, i * i) for i in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8)
    path = tmp_path_factory.mktemp("model") / "tiny"
    mhesa.save(model.eval(), Bytes(), path)
    return path


def rows_of(out):
    return [json.loads(line) for line in out.splitlines()]


def test_each_key_has_a_session_of_its_own(run, folder):
    code, out, err = run("score", folder, "--key", r"user=(\d)", "--json", data=LOG + b"no key\n")
    assert (code, err.decode()) == (0, "1 of 41 lines have no key; they share a session.\n")
    reader = Reader(*mhesa.load(folder))
    sessions = {key: Session(reader) for key in ("0", "1", "2", None)}
    for row, line in zip(rows_of(out), [*LOG.splitlines(True), b"no key\n"], strict=True):
        assert row["bits"] == pytest.approx(sessions[row.get("key")].score(line).sum(), abs=1e-3)
    lines = b"".join(json.dumps({"user": i % 2, "text": "x"}).encode() + b"\n" for i in range(4))
    rows = rows_of(run("score", folder, "--key-field", "user", "--json", data=lines)[1])
    assert [row["key"] for row in rows] == ["0", "1", "0", "1"]


def test_a_log_that_grows_goes_on(run, folder, tmp_path):
    log, state = tmp_path / "a.log", tmp_path / "state"
    whole = rows_of(run("score", folder, "--key", r"user=(\d)", "--json", data=LOG)[1])
    lines = LOG.splitlines(True)
    found = []
    for end in (10, 10, 25, 40):
        # The last line is not complete yet: it is read again when it is.
        log.write_bytes(b"".join(lines[:end]) + (lines[end][:5] if end < 40 else b""))
        out = run("score", folder, log, "--key", r"user=(\d)", "--json", "--state", state)[1]
        found += [row for row in rows_of(out) if row["bytes"] > 5]
    assert [(row["number"], row["bits"], row["score"]) for row in found] == [
        (row["number"], row["bits"], row["score"]) for row in whole
    ]


@pytest.mark.parametrize(
    "kills", [3, pytest.param(100, marks=[pytest.mark.torture, pytest.mark.timeout(3000)])]
)
def test_killed_runs_miss_no_line_and_mix_no_sessions(run, folder, tmp_path, kills):
    log, state = tmp_path / "a.log", tmp_path / "state"
    log.write_bytes(LOG * 50)
    arguments = ["score", str(folder), str(log), "--key", r"user=(\d)", "--json"]
    whole = {row["number"]: row for row in rows_of(run(*arguments)[1])}
    chance, seen = random.Random(0), {}
    for _ in range(kills):
        process = StartedCommand(*arguments, "--state", state)
        wanted = chance.randint(1, 700)
        came = [line for line, _ in zip(process.stdout, range(wanted), strict=False)]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen |= {row["number"]: row for row in rows_of(b"".join(came))}
    seen |= {row["number"]: row for row in rows_of(run(*arguments, "--state", state)[1])}
    for number, row in seen.items():
        assert row == whole[number]
    # What was given out by the runs that were killed may not have been read by this test.
    assert max(seen) == len(whole)


def test_a_full_disk_loses_no_line(run, folder, tmp_path):
    log = tmp_path / "a.log"
    log.write_text("".join(f"user={index} did this\n" for index in range(4000)))
    arguments = ["score", folder, log, "--key", r"user=(\d+)", "--json"]
    whole = {row["number"]: row for row in rows_of(run(*arguments)[1])}
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    done = run_on_a_small_disk(disk, copy, 300, *arguments, "--state", disk / "state")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert re.search(r"cannot keep sessions in .*state: (database or disk is full|disk I/O error)", line)
    seen = {row["number"]: row for row in rows_of(done.stdout.encode())}
    again = {row["number"]: row for row in rows_of(run(*arguments, "--state", copy / "state")[1])}
    assert again
    assert seen | again == whole
    assert all(seen[number] == whole[number] for number in seen)


def test_masks_are_read_and_not_counted():
    masks = Masks([r"id=\w+"], ["times", "uuids", "addresses", "paths"])
    line = "2024-05-06T07:08:09.123Z é 10.0.0.1:80 /var/log/x id=ab 123e4567-e89b-12d3-a456-426614174000 ok"
    counted = masks.counted(line.encode(), "line 1")
    left = bytes(np.frombuffer(line.encode(), np.uint8)[counted]).decode()
    assert left.split() == ["é", "ok"]
    with pytest.raises(InputError, match="--preset must be"):
        Masks(presets=["nothing"])


@given(
    scores=st.lists(st.floats(0.01, 1e6), min_size=1, max_size=300), rate=st.sampled_from([0.01, 0.1, 0.5])
)
def test_a_threshold_is_the_quantile_to_one_percent(scores, rate):
    alarms = FalseAlarms(rate)
    for score in scores:
        alarms.add(score)
    if rate * len(scores) < 1:
        assert alarms.threshold == math.inf
        return
    # The score that `rate` of all are above.
    exact = sorted(scores, reverse=True)[int(rate * len(scores))]
    assert exact / 1.011 <= alarms.threshold <= exact * 1.011
    again = FalseAlarms(rate)
    again.load_json(alarms.to_json())
    assert again.threshold == alarms.threshold


def test_alarms_are_marked_and_alone_with_their_context(run, folder):
    data = LOG * 5 + b"\x00\xff\x00 what is this\n" + LOG
    arguments = ["score", folder, "--false-alarms", "0.02", "--preset", "times", "--json"]
    code, out, _ = run(*arguments, data=data)
    rows = rows_of(out)
    marked = [row["number"] for row in rows if row["alarm"]]
    assert code == (3 if marked else 0)
    assert len(marked) <= 0.1 * len(rows)
    code, out, _ = run(*arguments, "--only", data=data)
    assert [row["number"] for row in rows_of(out)] == marked
    code, out, _ = run(*arguments, "--only", "--context", 1, data=data)
    near = {number + step for number in marked for step in (-1, 0, 1)} & {row["number"] for row in rows}
    assert [row["number"] for row in rows_of(out)] == sorted(near)
    err = run("score", folder, "--false-alarms", "0.001", data=LOG)[2].decode()
    assert err == "No line was marked: a threshold takes 1,000 lines, and 40 were read.\n"


def test_the_span_is_where_the_surprisal_is():
    bits = np.array([1.0] * 10 + [8.0, 9, 7] + [1.0] * 10)
    assert most_surprising_span(bits) == (10, 13)


def test_digits_neither_count_nor_stand_out():
    def read(bits):
        piece = ScoredPiece(Piece(1, 0, b"id 77 on\n", True), np.array(bits))
        [row] = LineScores().read("t", [piece])
        return row.score, row.span_text

    assert read([1.0, 1, 1, 30, 30, 1, 7, 1, 1]) == (7.0, b"o")
    assert read([1.0, 5, 1, 30, 30, 1, 1, 1, 1]) == (5.0, b"d")


@pytest.mark.parametrize("size", [40, 3 * SHOWN_BYTES])
@pytest.mark.parametrize("highest", [0, 1, 2])
def test_the_span_is_counted_from_the_beginning_of_a_line_in_pieces(size, highest):
    """In pieces that are kept whole, and in longer ones, of which only the span is kept."""
    letters = np.random.default_rng(0)
    texts = [bytes(letters.choice([*b"abc7 "], size).tolist()) for _ in range(3)]
    texts[2] = texts[2][:-1] + b"\n"
    bits = [letters.exponential(1.0, size) for _ in range(3)]
    # A digit and what is masked stand out most, and do not count.
    masked = texts[highest].index(b"c")
    bits[highest][[texts[highest].index(b"7"), masked]] = 99.0
    bits[highest][[20, 21]] = 50.0
    texts[highest] = texts[highest][:20] + b"XY" + texts[highest][22:]
    pieces = [Piece(1, size * i, text, i == 0) for i, text in enumerate(texts)]
    scored = [ScoredPiece(piece, cost) for piece, cost in zip(pieces, bits, strict=True)]
    [row] = LineScores(Masks(["c"])).read("t", scored)
    counted = [byte not in b"0123456789c" for byte in texts[highest]]
    start, end = most_surprising_span(np.where(counted, bits[highest], 0.0))
    assert start <= 20 < 22 <= end
    assert row.span == (size * highest + start, size * highest + end)
    assert row.span_text == texts[highest][start:end][:SHOWN_BYTES]
    assert (row.as_dict()["span"], row.size) == ([*row.span], 3 * size)
    assert row.bits == pytest.approx(sum(cost.sum() for cost in bits))


def test_a_long_line_that_is_kept_takes_little_memory():
    def row():
        text = b"x" * (1 << 16)
        [found] = LineScores().read("t", [ScoredPiece(Piece(1, 0, text), np.ones(len(text)))])
        return found

    row()
    tracemalloc.start()
    kept = [row() for _ in range(20)]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < len(kept) * 8 * SHOWN_BYTES


def test_nothing_is_said_to_be_nothing(run, folder):
    assert run("score", folder, data=b"") == (0, b"", b"There was nothing to score.\n")


@given(parts=st.lists(st.binary(max_size=9), max_size=9))
def test_pieces_are_the_text(parts):
    pieces = [piece for pieces in split_lines(parts) for piece in pieces]
    assert b"".join(piece.text for piece in pieces) == b"".join(parts)
    assert all(piece.is_last for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--key", "("], "is no regular expression"),
        (["--key", "x"], "has no group"),
        (["--mask", "[", "--by", "line"], "is no regular expression"),
        (["--key", "(x)", "--key-field", "x"], "--key-field cannot be used with --key"),
        (["--key", "(x)", "--by", "word"], "--key needs --by line"),
        (["--only"], "--only needs --false-alarms"),
        (["--false-alarms", "2"], "between 0 and 1"),
        (["--key-memory", "lots"], "--key-memory must be a size"),
        (["--key", "(x)", "--key-memory", "1"], "too little memory for a session"),
        (["--tsv"], "--tsv needs --by word, character, sentence or token"),
        (["--by", "word", "--unit", "bans"], "unit must be bits or nats"),
        (["--by", "word", "--words", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--key", r"((a|aa|a)+)+$y"], "takes more than 1 s in -, line 1"),
    ],
)
def test_what_cannot_be_is_refused(run, folder, arguments, message):
    code, _, err = run("score", folder, *arguments, data=b"a" * 60 + b"\n")
    assert (code, err.count(b"\n")) == (2, 1)
    assert message in err.decode()


# Words


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def reader(request):
    torch.manual_seed(0)
    tokenizer = Bytes() if request.param == "bytes" else train_bpe([TEXT.encode()] * 9, 300)
    model = GatedExponentialSmoothingLM(num_tokens=len(tokenizer), dim=16, depth=2, heads=2, dim_mhesa=8)
    return Reader(model.eval(), tokenizer)


TEXT = "The cat, who was small, sat on the mat.  It slept!\nWhy? Nobody knew why it did"


def predictions(reader):
    """The tokens of the text, where each ends, and the log-probabilities of what follows each in fp64."""
    ids = reader.tokenizer.encode_bytes(TEXT.encode()).astype(int)
    read = torch.tensor([[reader.tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        logprobs = reader.model(read)[0].double().log_softmax(-1).numpy()
    return ids, np.cumsum([len(reader.token_bytes[token]) for token in ids]), logprobs


def test_words_cost_what_their_tokens_cost(reader):
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
