"""`mhesa generate --session` and `mhesa score` as a person uses them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from commands import StartedCommand, run_command

import mhesa
from mhesa import GatedExponentialSmoothingLM, cli
from mhesa.hf import ByteTokenizer, MhesaForCausalLM
from mhesa.training.settings import TrainingSettings

COMMAND = [sys.executable, "-m", "mhesa"]
TEXT = b"one line\nsecond line\n\nthird \xff\x00 line\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    plain = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=2, heads=2, dim_mhesa=8)
    MhesaForCausalLM.from_plain(plain).save_pretrained(path)
    ByteTokenizer().save_pretrained(path)
    return path


@pytest.fixture
def fails(monkeypatch, capsys):
    """Run the command in this process; it must fail with one line on standard error, which is returned."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mhesa", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err

    return run


def test_a_session_continues_across_processes(run, folder, tmp_path):
    file = tmp_path / "talk.session"
    _, whole, _ = run("generate", folder, "--prompt", "abc", "--length", 30, "--temperature", 0)
    first = run_command(
        "generate", folder, "--prompt", "abc", "--length", 12, "--session", file, "--temperature", 0
    )
    second = run_command("generate", folder, "--length", 18, "--session", file, "--temperature", 0)
    assert second.returncode == 0, second.stderr
    assert first.stdout[:-1] + second.stdout == whole
    assert file.stat().st_size < 4096


def test_a_foreign_session_is_refused_and_kept(fails, folder, tmp_path):
    file = tmp_path / "talk.session"
    file.write_bytes(b"not mine")
    assert "talk.session is damaged" in fails("generate", folder, "--session", file)
    assert file.read_bytes() == b"not mine"


def test_lines_are_scored(run, folder, tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(TEXT)
    code, out, err = run("score", folder, path)
    assert (code, err) == (0, b"")
    lines = out.decode().splitlines()
    assert [line.split()[2] for line in lines] == [f"{path}:{number}" for number in (1, 2, 3, 4)]
    assert lines[3].endswith("third \N{REPLACEMENT CHARACTER}\\x00 line")
    rows = [json.loads(line) for line in run("score", folder, "--json", data=TEXT)[1].splitlines()]
    for line, row in zip(lines, rows, strict=True):
        assert float(line.split()[0]) == pytest.approx(row["bits"], abs=0.06)
    total = json.loads(run("eval", folder, path, "--json")[1])
    assert sum(row["bits"] for row in rows) == pytest.approx(total["bits_per_byte"] * len(TEXT), rel=1e-4)


def test_top_and_document_and_token(run, folder):
    rows = [json.loads(line) for line in run("score", folder, "--json", data=TEXT)[1].splitlines()]
    top = run("score", folder, "-", "--json", "--top", 2, data=TEXT)[1].splitlines()
    assert [json.loads(line) for line in top] == sorted(rows, key=lambda row: -row["bits"])[:2]
    (whole,) = run("score", folder, "--by", "document", "--json", data=TEXT)[1].splitlines()
    assert json.loads(whole)["bytes"] == len(TEXT)
    assert len(run("score", folder, "--by", "token", data=TEXT)[1].splitlines()) == len(TEXT)


def test_a_page_is_written(run, folder, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = run("score", folder, "--heatmap", page, data=TEXT)
    assert (code, out) == (0, b"")
    assert err.decode().split() == ["Wrote", str(page)]
    assert page.read_text().startswith("<!doctype html>")
    # Again, and with what else was asked for.
    code, out, _ = run("score", folder, "--heatmap", page, "--json", data=TEXT)
    assert (code, len(out.splitlines())) == (0, 4)
    essay = tmp_path / "essay.txt"
    essay.write_bytes(TEXT)
    code, _, err = run("score", folder, "--heatmap", essay, data=TEXT)
    assert (code, err.count(b"\n")) == (2, 1)
    assert b"is not marked as a page of mhesa" in err
    assert essay.read_bytes() == TEXT


def test_lines_come_as_they_are_written_and_interrupting_is_quiet(folder):
    process = subprocess.Popen(
        [*COMMAND, "score", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for number in (1, 2, 3):
        process.stdin.write(b"a line\n")
        process.stdin.flush()
        assert process.stdout.readline().split()[2:] == [str(number).encode(), b"a", b"line"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_interrupting_a_ranking_shows_it_so_far(folder, tmp_path):
    process = StartedCommand("score", folder, "--top", 1, "--heatmap", tmp_path / "page.html")
    process.stdin.write(b"a line\n" * 20_000)
    process.stdin.flush()
    # The last lines are being scored, or have been, once this much has left the pipe.
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert b"Traceback" not in err
    assert len(out.splitlines()) <= 1


def test_interrupting_a_page_ends_it(folder, tmp_path):
    page = tmp_path / "page.html"
    process = StartedCommand("score", folder, "--heatmap", page)
    # A file is written in blocks: once one is there, the text is followed.
    while not (page.exists() and page.stat().st_size):
        process.stdin.write(b"a line\n" * 100)
        process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == 128 + signal.SIGINT
    assert page.read_text().endswith("</pre>\n")


@pytest.mark.parametrize("command", ["score", "generate"])
def test_a_reader_that_leaves_early_ends_it_quietly(folder, command):
    # The likeliest tokens never end a text of this model.
    arguments = {"score": [], "generate": ["--length", "100000", "--temperature", "0"]}[command]
    process = subprocess.Popen(
        [*COMMAND, command, str(folder), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if command == "score":
        process.stdin.write(b"a line\n" * 10)
        process.stdin.flush()
    process.stdout.read(10)
    process.stdout.close()
    if command == "score":
        process.stdin.write(b"a line\n" * 10)
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) != 0


@pytest.mark.parametrize("arguments", [["generate", "--length", "50"], ["config"], ["--version"]], ids=str)
def test_a_full_device_is_one_line_on_standard_error(folder, arguments):
    command, *options = arguments
    where = [] if command == "--version" else [str(folder)]
    if command == "config":
        TrainingSettings(out=str(folder)).save(folder / "settings.json")
    with open("/dev/full", "wb") as full:
        streams = {"stdin": subprocess.DEVNULL, "stdout": full, "stderr": subprocess.PIPE}
        done = subprocess.run([*COMMAND, command, *where, *options], **streams, check=False)
    assert (done.returncode, done.stderr) == (1, b"Error: cannot go on: No space left on device\n")


def test_a_closed_standard_output_is_no_error(folder):
    line = 'exec "$0" "$@" >&-'
    done = subprocess.run(
        ["sh", "-c", line, *COMMAND, "score", str(folder)], input=TEXT, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_invalid_arguments_are_refused(fails, folder, tmp_path, monkeypatch):
    assert "--by must be" in fails("score", folder, "--by", "page")
    assert "--top must be" in fails("score", folder, "--top", 0)
    assert "nowhere" in fails("score", folder, tmp_path / "nowhere")
    assert "cannot write" in fails("score", folder, tmp_path, "--heatmap", tmp_path / "no" / "page.html")
    assert "cannot write" in fails("generate", folder, "--session", tmp_path / "no" / "talk.session")
    assert "is a file" in fails("generate", folder / "config.json")
    assert "quantize" in fails("score", folder, tmp_path, "--quantize", "int3")
    assert "precision" in fails("generate", folder, "--precision", "fp8")
    assert "min_p" in fails("generate", folder, "--min-p", 2)
    assert "empty" in fails("generate", folder, "--stop", "")
    texts = tmp_path / "one.txt", tmp_path / "two.txt"
    for text in texts:
        text.write_text("some words")
    message = fails("score", folder, *texts, "--by", "word", "--words", texts[0])
    assert "--words are those of one text; give one source" in message
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input" in fails("score", folder)
    assert "standard input" in fails("generate", folder, "--prompt", "-")
    assert "seed" in fails("generate", folder, "--prompt", "a", "--seed", -1)


def in_a_terminal(*arguments):
    """What the command writes on a terminal."""
    leader, follower = os.openpty()
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdout=follower, stdin=subprocess.DEVNULL)
    os.close(follower)
    shown = b""
    with suppress(OSError):  # at the end
        while part := os.read(leader, 1 << 16):
            shown += part
    assert process.wait(timeout=60) == 0
    os.close(leader)
    # Where colorama is there, numba imports it, and it resets colours at the end.
    return shown.removesuffix(b"\x1b[0m")


def test_a_terminal_gets_no_control_characters(folder):
    """Of a random model, which writes any byte; a pipe gets what it wrote."""
    arguments = ["generate", folder, "--length", "300", "--seed", "1", "--prompt", "\x1b[31m"]
    written = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, check=True).stdout
    assert b"\x1b[31m" in written
    shown = in_a_terminal(*arguments)
    assert shown.startswith(b"\\x1b[31m")
    assert not set(shown) & ({*range(32)} - set(b"\t\n\r"))


@pytest.mark.parametrize("options", [[], ["--preset", "numbers"], ["--false-alarms", "0.5"]])
def test_a_terminal_marks_the_part_that_stands_out(folder, tmp_path, options):
    (tmp_path / "log").write_bytes(b"one line\n" * 3)
    shown = in_a_terminal("score", folder, tmp_path / "log", *options)
    # With a rate of false alarms only lines that are marked, here none.
    assert shown.count(b"\x1b[1;7;31m") == (0 if "--false-alarms" in options else 3)


def test_a_prompt_that_is_interrupted_is_not_in_the_session(folder, tmp_path):
    path = tmp_path / "talk.session"
    process = StartedCommand("generate", folder, "--prompt", "-", "--session", path)
    for _ in range(3):
        process.stdin.write(b"a line\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"a line\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT
    assert mhesa.Session.load(path, mhesa.Reader(*mhesa.load(folder))).position == 0
