"""Commands and the files they read and write: encodings, outputs that are inputs, runs below their text."""

import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import FORKED, run_command, run_processes
from serving import save_model

import mhesa
from mhesa import cli
from mhesa.errors import InputError
from mhesa.locks import only_writer_of_folder
from mhesa.training.run import Stopped

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "mhesa"]
LINES = b"".join(b"line %d of some\n" % n for n in range(400))
SIZES = ("--dim", 8, "--depth", 1, "--heads", 1, "--dim-mhesa", 8, "--context", 16, "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


def fails(run, *arguments, **options):
    code, out, err = run(*arguments, **options)
    assert (code, out) == (2, b"")
    assert b"Traceback" not in err
    return err.decode()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts" / "text.txt"
    path.parent.mkdir()
    path.write_bytes(LINES)
    return path


# Outputs that are inputs


@pytest.mark.parametrize(
    ("source", "spelling"),
    [
        ("file", "itself"),
        ("folder", "a link"),
        ("pattern", "a hard link"),
        ("file", "dots"),
        ("standard input", "a link"),
    ],
)
def test_a_page_does_not_replace_a_source(run, folder, text, source, spelling):
    page = {
        "itself": text,
        "a link": text.parent / ".link",
        "a hard link": text.parent / ".hard",
        "dots": text.parent / ".." / text.parent.name / text.name,
    }[spelling]
    if spelling == "a link":
        page.symlink_to(text)
    if spelling == "a hard link":
        os.link(text, page)
    named = {"file": text, "folder": text.parent, "pattern": text.parent / "*.txt"}
    if source == "standard input":
        done = run_command("score", folder, "--heatmap", page, stdin=text)
        assert (done.returncode, done.stdout) == (2, b"")
        err = done.stderr.decode()
    else:
        err = fails(run, "score", folder, named[source], "--heatmap", page)
    assert f"{page} is also an input; choose another output" in err
    assert text.read_bytes() == LINES


@pytest.mark.parametrize("command", ["score", "generate"])
def test_standard_output_is_not_read_without_end(folder, text, command):
    arguments = {"score": [text.parent], "generate": ["--prompt", "-", "--length", "1"]}[command]
    done = run_command(command, folder, *arguments, stdin=text, stdout=text)
    assert done.returncode == 2
    assert b"standard output is also an input" in done.stderr
    assert text.read_bytes() == LINES


def test_a_session_replaces_files_alone(tmp_path, folder):
    session = mhesa.Session(mhesa.Reader(*mhesa.load(folder)))
    session.feed("text")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        before = os.lstat(path)
        with pytest.raises(InputError, match=r"is a folder, a device or a pipe; give a file"):
            session.save(path)
        assert (os.lstat(path).st_mode, os.lstat(path).st_ino) == (before.st_mode, before.st_ino)
    (tmp_path / "link").symlink_to("target")
    session.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert mhesa.Session.load(tmp_path / "target", session.reader).position == session.position


def test_a_file_under_two_names_is_scored_once(run, folder, text):
    (text.parent / "link").symlink_to(text.name)
    code, out, _ = run("score", folder, text, text.parent / "link", text.parent, "--by", "document", "--json")
    assert code == 0
    assert len(out.splitlines()) == 1


TRAIN = ("--steps", 2, *SIZES)


@pytest.mark.parametrize(
    "what", ["metrics", "a link", "a folder's file", "standard input", "tokenizer", "config"]
)
def test_a_run_does_not_replace_its_inputs(run, tmp_path, what):
    out = tmp_path / "run"
    out.mkdir()
    for name in ("metrics.jsonl", "checkpoints/text", "tokenizer.json", "config.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(LINES * 8 if name != "config.json" else b"dim: 8\n")
    (tmp_path / "link").symlink_to(out / "metrics.jsonl")
    (tmp_path / "text").write_bytes(LINES * 8)
    named = {
        "metrics": [out / "metrics.jsonl", "--text-field", "text"],
        "a link": [tmp_path / "link"],
        "a folder's file": [out / "checkpoints"],
        "standard input": ["-"],
        "tokenizer": [tmp_path / "text", "--tokenizer", out],
        "config": [tmp_path / "text", "--config", out / "config.json"],
    }[what]
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    mine = os.dup(0)
    try:
        if what == "standard input":
            with (out / "metrics.jsonl").open() as file:
                os.dup2(file.fileno(), 0)
        code, _, err = run("train", *named, "--out", out, "--overwrite", *TRAIN, data=LINES * 8)
    finally:
        os.dup2(mine, 0)
        os.close(mine)
    assert code == 2, err.decode()
    assert b"is also an input; choose another output" in err
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before


def test_outputs_that_are_no_plain_files_are_refused_at_once(run, folder, text, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null", tmp_path):
        for arguments in (
            ("score", folder, text, "--heatmap", path),
            ("generate", folder, "--length", 1, "--session", path),
        ):
            assert "is a folder, a device or a pipe; give a file" in fails(run, *arguments)
    for out in (tmp_path / "pipe", "/dev/null", text):
        for more in ([], ["--overwrite"]):
            assert "is a file; give a folder" in fails(run, "train", text, "--out", out, *TRAIN, *more)


def test_a_models_files_are_not_replaced(run, folder, text):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name in ("config.json", "model.safetensors"):
        for arguments in (
            ("score", folder, text, "--heatmap", folder / name),
            ("generate", folder, "--length", 1, "--session", folder / name),
        ):
            assert "is also an input" in fails(run, *arguments)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# One writer


def train_for_long(settings):
    mhesa.train(settings)


def files_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_second_run_in_a_folder_is_refused(run, tmp_path):
    out, source = tmp_path / "run", tmp_path / "text"
    source.write_bytes(LINES * 8)
    sizes = {"dim": 8, "depth": 1, "heads": 1, "dim_mhesa": 8, "context": 16, "device": "cpu"}
    settings = mhesa.TrainingSettings(out=str(out), sources=(str(source),), steps=10**7, **sizes)
    process = FORKED.Process(target=train_for_long, args=(settings,), daemon=True)
    process.start()
    try:
        while not (out / "metrics.jsonl").exists():
            assert process.is_alive()
            time.sleep(0.05)
        written = (out / "settings.json").read_bytes()
        holder = f"{out} is being written by process {process.pid} on {platform.node()};"
        for more in ([source], [source, "--overwrite"], ["--resume"]):
            assert holder in fails(run, "train", *more, "--out", out, "--steps", 2)
        with pytest.raises(InputError, match="is being written by process"):
            mhesa.train(replace(settings, steps=2), overwrite=True)
        assert (out / "settings.json").read_bytes() == written
    finally:
        process.kill()
        process.join()
    code, _, err = run("train", source, "--out", out, "--overwrite", *TRAIN)
    assert code == 0, err.decode()
    assert not (out / ".lock").exists()


def test_every_process_of_a_group_is_refused(tmp_path):
    source = tmp_path / "text"
    source.write_bytes(LINES * 8)
    with only_writer_of_folder(tmp_path / "run"):
        done = run_processes(2, "train", source, "--out", tmp_path / "run", *TRAIN)
    assert done.returncode == 2
    assert f"is being written by process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_backend_that_cannot_serve_the_rates_replaces_no_run(run, text, tmp_path):
    arguments = ("train", text, "--out", tmp_path / "run", "--overwrite", "--steps", 2, *SIZES)
    assert run(*arguments)[0] == 0
    before = files_below(tmp_path / "run")
    message = fails(run, *arguments, "--backend", "fft")
    assert "'fft' cannot serve a cpu tensor with rates of every step here; these can: numba," in message
    assert files_below(tmp_path / "run") == before
    message = fails(run, "generate", tmp_path / "run", "--backend", "fft")
    assert "'fft' cannot serve a cpu tensor with rates of every step" in message
    assert run(*arguments, "--backend", "fft", "--smoothing", "fixed")[0] == 0
    assert run("generate", tmp_path / "run", "--backend", "fft", "--length", 5)[0] == 0


def files_below(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_without_text_leaves_no_folder(run, tmp_path):
    fails(run, "train", tmp_path / "nothing", "--out", tmp_path / "a" / "b", *TRAIN)
    assert not (tmp_path / "a").exists()


def test_the_second_to_write_a_session_is_refused(run, folder, tmp_path):
    path = tmp_path / "sessions" / "talk"
    path.parent.mkdir()
    reader = mhesa.Reader(*mhesa.load(folder))
    with mhesa.Session.open(path, reader) as session:
        session.feed("mine")
        refused = fails(run, "generate", folder, "--session", path, "--length", 1, "--prompt", "lost")
        assert f"is being written by process {os.getpid()} on {platform.node()}" in refused
    assert run("generate", folder, "--session", path, "--length", 1, "--prompt", "next")[0] == 0
    assert mhesa.Session.load(path, reader).position in (8, 9)
    assert [file.name for file in path.parent.iterdir()] == ["talk"]


# JSON and YAML of any depth


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 50_000,
        "{a: " * 10_000,
        "dim: 8\n" * 100_000,
        "lr: 1" + "0" * 6000,
        "steps: 0x" + "f" * 20_000,
        "steps: " + "59:" * 5000 + "1",
        'dim: !!int ""',
        "dim: !!bool maybe",
        "dim: !!timestamp soon",
        "lr: [[1, 2], 3]",
        "sources: {a: b}",
        "sources: !!pairs [a: [b, c]]",
        "sources: !!set {a}",
        "? [a]\n: b",
        BOMB + "lr: *i",
        "\x00",
    ],
    ids=lambda content: content[:16],
)
def test_settings_of_any_depth_and_size_are_refused_in_a_line(run, tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    err = fails(run, "train", "--config", path, "--out", tmp_path / "run")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "settings.json",
        "manifest.json",
        "progress.json",
    ],
)
def test_a_folders_json_of_any_depth_is_refused_in_a_line(run, tmp_path, name):
    (tmp_path / "text").write_bytes(LINES * 8)
    out = tmp_path / "run"
    code, _, err = run("train", tmp_path / "text", "--out", out, *TRAIN)
    assert code == 0, err.decode()
    below = out / "checkpoints" / "step-2" if name in ("manifest.json", "progress.json") else out
    (below / name).write_text(DEEP)
    if name == "progress.json":
        files = json.loads((below / "manifest.json").read_text())
        files["files"][name] = {"bytes": len(DEEP), "sha256": hashlib.sha256(DEEP.encode()).hexdigest()}
        (below / "manifest.json").write_text(json.dumps(files))
    commands = {
        "config.json": [("generate", out)],
        "tokenizer_config.json": [("generate", out), ("train", tmp_path / "text", "--tokenizer", out)],
        "tokenizer.json": [("generate", out), ("train", tmp_path / "text", "--tokenizer", out)],
        "settings.json": [("config", out), ("train", "--resume", "--out", out, "--steps", 3)],
    }.get(name, [("train", "--resume", "--out", out, "--steps", 3)])
    for command in commands:
        more = ["--out", tmp_path / "other"] if command[0] == "train" and "--out" not in command else []
        err = fails(run, *command, *more)
        assert len(err.splitlines()) == 1
        assert name in err or "nested too deeply" in err


# Rows


@pytest.mark.parametrize("command", ["eval", "score"])
def test_the_text_of_rows_may_have_any_field(run, folder, tmp_path, command):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": body}) + "\n" for body in ("one\n", "two\n")))
    code, out, _ = run(command, folder, rows, "--text-field", "body", "--json")
    assert code == 0
    results = [json.loads(line) for line in out.splitlines()]
    assert sum(result["bytes"] for result in results) == 8
    assert "has no field text; its fields are body: name one with --text-field" in fails(
        run, command, folder, rows
    )


# Encodings


def printed(monkeypatch, encoding, *arguments):
    """What a command prints where standard output has an encoding."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["mhesa", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    stdout.flush()
    assert caught.value.code == 0
    return stdout.buffer.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_output_is_escaped_where_its_encoding_lacks_characters(monkeypatch, folder, tmp_path, encoding):
    path = tmp_path / "größe 漢\udcff.txt"
    path.write_text("Größe 漢字\n" * 3, encoding="utf-8")
    prompt = ["--prompt", "Größe 漢", "--length", "20", "--seed", "1"]
    size = {"ascii": "Gr\\xf6\\xdfe", "latin-1": "Größe"}[encoding]
    assert printed(monkeypatch, encoding, "generate", folder, *prompt).startswith(f"{size} \\u6f22")
    for arguments in ([], ["--json"], ["--top", "1", "--heatmap", tmp_path / "page.html"]):
        assert f"{size} \\u6f22\\u5b57" in printed(monkeypatch, encoding, "score", folder, path, *arguments)
    assert "\\udcff.txt" in printed(monkeypatch, encoding, "eval", folder, tmp_path / "gr*", path)
    page = (tmp_path / "page.html").read_text("utf-8")
    assert ">Größe</span>" in page
    assert ">漢字</span>" in page


def test_output_is_escaped_in_the_plainest_locale(folder):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    arguments = ["generate", folder, "--prompt", "Größe 漢", "--length", "1", "--seed", "1"]
    done = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Gr\\xf6\\xdfe \\u6f22")


# Runs below their own text


def test_a_run_below_its_text_is_resumed_and_the_next_one_begins(run, tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES * 8)
    for out in (tmp_path / "one", tmp_path / "two", tmp_path):
        code, _, err = run("train", tmp_path, "--out", out, "--steps", 2, *SIZES)
        assert code == 0, err.decode()
        code, _, err = run("train", "--resume", "--out", out, "--steps", 3)
        assert code == 0, err.decode()
    corpora = [
        json.loads((out / "settings.json").read_text())["corpus"]
        for out in (tmp_path / "one", tmp_path / "two", tmp_path)
    ]
    assert corpora[0] == corpora[1] == corpora[2]


WITHOUT_HOME = """
import os, sys
# A user without a name, who may read what Python is made of.
os.setresuid(54321, 0, 0)
from mhesa import cli
cli.main()
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes a user without a name")
def test_a_user_without_home_and_name_can_train(tmp_path):
    (tmp_path / "a.txt").write_bytes(LINES * 8)
    hidden = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    arguments = ["train", tmp_path, "--out", tmp_path / "run", "--steps", 1, *SIZES]
    command = [sys.executable, "-c", WITHOUT_HOME, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_names_are_shown_as_they_are(run, folder, tmp_path):
    """Rich takes brackets for markup, `[/x]` for an error in it, and words between colons for emoji."""
    home = tmp_path / "a[b] :fire:" / "[/x]"
    home.mkdir(parents=True)
    names = [home / "one.txt", home / "two [red].txt"]
    for name in names:
        name.write_bytes(LINES)
    shutil.copytree(folder, home / "words")
    trained = ("--tokenizer", home / "words", "--steps", 1, *SIZES)
    for text in (
        run("eval", folder, *names)[1],
        run("export", folder, "--web", home / "site")[1],
        run("score", folder, names[0], "--heatmap", home / "map.html")[2],
        run("train", *names, "--out", home / "run", *trained)[2],
        run("train", "--resume", "--steps", 2, "--out", home / "run")[1],
    ):
        assert str(home) in text.decode()
    assert all(str(name).encode() in run("eval", folder, *names)[1] for name in names)


def test_interrupted_training_names_its_folder(monkeypatch, run, tmp_path):
    def stop(settings, **options):
        raise Stopped(signal.SIGINT, 7, Path(settings.out))

    monkeypatch.setattr("mhesa.training.run.train", stop)
    code, _, said = run("train", "--out", "runs/[/x]")
    how = b"Continue with: mhesa train --resume --out runs/[/x]\n"
    assert (code, said) == (130, b"Stopped after step 7. " + how)


def test_serving_without_a_part_of_its_extra_names_it():
    code = "import sys; sys.modules['httptools'] = None; sys.argv = ['mhesa', 'serve', 'models/python']"
    script = f"{code}\nfrom mhesa import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "Error: serving needs httptools: pip install 'mhesa[serve]'\n"
