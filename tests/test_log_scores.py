"""`mhesa score` on logs: sessions by key, masks, alarms, what survives a kill."""

import json
import math
import random
import re
import signal
import tracemalloc

import numpy as np
import pytest
from commands import StartedCommand, run_on_a_small_disk
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import save_tiny_model

import mhesa
from mhesa import Reader, Session
from mhesa.cli.score_output import SHOWN, _with_strong_span
from mhesa.errors import InputError
from mhesa.inference.line_scores import FalseAlarms, LineScores, most_surprising_span
from mhesa.inference.lines import Masks, Piece, split_lines
from mhesa.inference.scoring import SHOWN_BYTES, ScoredPiece

LOG = b"".join(b"12:00:%02d user=%d did thing %d\n" % (i % 60, i % 3, i * i) for i in range(40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


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


def test_a_line_without_end_is_in_no_session_when_other_logs_are_read(run, folder, tmp_path):
    first, second, state = tmp_path / "a.log", tmp_path / "b.log", tmp_path / "state"
    options = ("--key", r"user=(\d)", "--json", "--state", state, "--false-alarms", 0.5)
    lines = LOG.splitlines(True)
    found = []
    for data in (b"".join(lines[:10]) + lines[10][:12], b"".join(lines[:20])):
        first.write_bytes(data)
        second.write_bytes(b"12:00:00 user=7 of another log\n")
        found.append(rows_of(run("score", folder, first, second, *options)[1]))
    state.unlink()
    first.write_bytes(b"".join(lines[:10]))
    expected = rows_of(run("score", folder, first, second, *options)[1])
    assert [row for row in found[0] if row["number"] < 11] == expected
    first.write_bytes(b"".join(lines[:20]))
    expected = rows_of(run("score", folder, first, *options)[1])
    assert [row for row in found[1] if row["source"] == str(first)] == expected


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


def test_a_span_holds_whole_characters():
    text = "aé日😀b\n".encode()
    for binary in (
        b"\xb0\xa1\xb0\xa2\xb0",
        b"\x80" * 9,
        b"\xc3\x80\x80\x80",
        b"abc\xe2\x82",
        "日本".encode("utf-16"),
    ):
        for place in range(len(binary)):
            bits = np.zeros(len(binary))
            bits[place] = 9.0
            [row] = LineScores().read("t", [ScoredPiece(Piece(1, 0, binary), bits)])
            assert row.span[0] <= place < row.span[1] <= len(binary)
            assert row.span[1] - row.span[0] <= 3
    for place in range(len(text)):
        bits = np.zeros(len(text))
        bits[place] = 9.0
        [row] = LineScores().read("t", [ScoredPiece(Piece(1, 0, text), bits)])
        start, end = row.span
        assert start <= place < end
        assert row.span_text.decode() == text[start:end].decode() in "aé日😀b\n"


@pytest.mark.parametrize("size", [20, 5000])
@pytest.mark.parametrize("place", [0, 3, 19, 150, 700, 4000])
def test_a_terminal_shows_the_part_that_stands_out(size, place):
    """Wherever it is in a line, in at most 160 characters; blanks and line ends too."""
    text, bits = bytearray(b"." * size + b"\n"), np.zeros(size + 1)
    place = min(place, size)
    text[place : place + 1], bits[place] = (b"\n" if place == size else b" "), 9.0
    [row] = LineScores().read("t", [ScoredPiece(Piece(1, 0, bytes(text)), bits)])
    shown = _with_strong_span(row)
    before, strong, after = re.split("\033.*?m", shown)
    assert strong == ("\\n" if place == size else " ")
    assert len(before + strong + after) <= SHOWN + 2
    assert ("…" in before) == (place >= SHOWN)
    assert before.endswith("." * min(place, 60)) or place > SHOWN_BYTES


@pytest.mark.parametrize("option", [["--mask", "e"], ["--preset", "numbers"], ["--false-alarms", "0.5"]])
def test_top_ranks_by_the_score_where_there_is_one(run, folder, option):
    rows = rows_of(run("score", folder, *option, "--json", data=LOG)[1])
    best = sorted(rows, key=lambda row: -row["score"])[:3]
    assert rows_of(run("score", folder, *option, "--json", "--top", 3, data=LOG)[1]) == best
    lines = run("score", folder, *option, "--top", 3, data=LOG)[1].decode().splitlines()
    assert [float(line.lstrip("!").split()[0]) for line in lines] == pytest.approx(
        [row["score"] for row in best], abs=0.06
    )


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


def test_empty_input_prints_a_message(run, folder):
    assert run("score", folder, data=b"") == (0, b"", b"There was nothing to score.\n")


@given(parts=st.lists(st.binary(max_size=9), max_size=9))
def test_pieces_joined_are_the_text(parts):
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
        (["--false-alarms", "2"], "between 1e-12 and 1"),
        (["--false-alarms", "1e-320"], "between 1e-12 and 1"),
        (["--key", "(x)", "--key-memory", "lots"], "--key-memory must be a size"),
        (["--key-memory", "1GB"], "--key-memory needs --key, --key-field or --state"),
        (["--by", "word", "--spill", "1"], "--spill needs --tsv or --json"),
        (["--key", "(x)", "--key-memory", "1"], "too little memory for a session"),
        (["--tsv"], "--tsv needs --by word, character, sentence or token"),
        (["--by", "word", "--unit", "bans"], "unit must be bits or nats"),
        (["--by", "word", "--words", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--key", r"((a|aa|a)+)+$y"], "takes more than 1 s in -, line 1"),
    ],
)
def test_invalid_arguments_are_refused(run, folder, arguments, message):
    code, _, err = run("score", folder, *arguments, data=b"a" * 60 + b"\n")
    assert (code, err.count(b"\n")) == (2, 1)
    assert message in err.decode()
