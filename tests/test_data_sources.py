"""Finding text: folders, names, patterns, links, standard input."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from commands import ordinary_user
from texts import joined

from mhesa.data.corpus import Source
from mhesa.data.sources import read_sources, standard_library
from mhesa.data.standard_input import standard_input as read_standard_input
from mhesa.errors import InputError


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a.txt").write_bytes(b"first \xff\xfe\x00 bytes")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_bytes(b"third")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_bytes(b"unseen")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_a_folder_gives_its_files_as_they_are(texts):
    assert [document.data for document in read_sources([str(texts)])] == [
        b"first \xff\xfe\x00 bytes",
        b"second",
        b"third",
    ]


def test_a_file_named_twice_is_read_once(texts):
    sources = [str(texts / "b.txt"), str(texts / "*.txt"), str(texts / "**" / "*.md")]
    assert joined(read_sources(sources)) == b"second" + b"first \xff\xfe\x00 bytes" + b"third"


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    (tmp_path / "notes[1].txt").write_bytes(b"here")
    assert joined(read_sources([str(tmp_path / "notes[1].txt")])) == b"here"


def test_dash_is_standard_input(texts, standard_input):
    standard_input(b"piped \xff")
    assert joined(read_sources([str(texts / "b.txt"), "-"])) == b"secondpiped \xff"


def test_interrupt_stops_a_blocking_read(monkeypatch):
    def interrupt():
        # Once the other thread waits; a signal that this thread gets does not wake it.
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    reader, writer = os.pipe()
    # What starts tests in the background has signals from the keyboard ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(reader) as stdin, open(writer, "w"):
        monkeypatch.setattr(sys, "stdin", stdin)
        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            next(read_standard_input())
    signal.signal(signal.SIGINT, before)


def test_no_source_is_the_standard_library():
    names = {path.name for path in standard_library()}
    assert {"argparse.py", "json"} - names == {"json"}
    assert not any("site-packages" in path.parts or "test" in path.parts for path in standard_library())
    assert len(joined(read_sources([]))) > 1_000_000


def test_one_file_under_many_names_is_read_once(texts, monkeypatch):
    monkeypatch.chdir(texts)
    (texts / "link.txt").symlink_to("b.txt")
    os.link(texts / "b.txt", texts / "hard.txt")
    (texts / "again").symlink_to("deep")
    spellings = ["b.txt", "./b.txt", "deep/../b.txt", str(texts / "b.txt"), "link.txt", "hard.txt", "*b.txt"]
    assert joined(read_sources(spellings)) == b"second"
    assert [Path(document.name).name for document in read_sources(["."])] == ["a.txt", "b.txt", "c.md"]
    assert read_sources(["again", "deep", "."])[0].data == b"third"


def test_linked_folders_are_read_and_circles_of_them_end(texts, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "far.txt").write_bytes(b"linked")
    (elsewhere / "back").symlink_to(texts)
    (texts / "deep" / "there").symlink_to(elsewhere)
    (texts / "deep" / "self").symlink_to(".")
    assert joined(read_sources([str(texts)])) == b"first \xff\xfe\x00 bytessecondthirdlinked"


def test_an_unreadable_path_below_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "dangling").symlink_to("nothing")
    for source in (tmp_path, tmp_path / "dangling", tmp_path / "*"):
        with pytest.raises(InputError, match=r"cannot read .*dangling: No such file or directory"):
            read_sources([str(source)])
    (tmp_path / "dangling").unlink()
    # A folder that not even the superuser can list by its path, which is too long.
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    for source in (tmp_path, tmp_path / "**" / "*.txt"):
        with pytest.raises(InputError, match=r"cannot read .*ddd: File name too long"):
            read_sources([str(source)])


def test_a_folder_without_permission_is_named():
    with TemporaryDirectory() as folder:  # pytest's own are closed to other users
        os.chmod(folder, 0o755)
        (Path(folder) / "closed").mkdir(0o000)
        with ordinary_user(), pytest.raises(InputError, match=r"cannot read .*closed: Permission denied"):
            read_sources([folder])
        (Path(folder) / "closed").chmod(0o700)


def test_files_of_a_run_are_no_text(texts):
    before = Source([str(texts)]).sha256
    for run in (texts, texts / "runs" / "one"):
        (run / "checkpoints" / "checkpoint-1").mkdir(parents=True)
        (run / "settings.json").write_text(json.dumps({"settings": {}, "corpus": {}}))
        for name in ("metrics.jsonl", "model.safetensors", "checkpoints/checkpoint-1/model.safetensors"):
            (run / name).write_text("{}")
    assert Source([str(texts)]).sha256 == before
    assert Source([str(texts / "**")]).sha256 == before
    (texts / "runs" / "one" / "notes.txt").write_bytes(b"fourth")
    assert joined(read_sources([str(texts)])).endswith(b"fourth")
    # A file of that name that is no run's is text like any other.
    (texts / "deep" / "settings.json").write_text("[]")
    (texts / "deep" / "metrics.jsonl").write_text('{"text": "row"}')
    assert b"row" in joined(read_sources([str(texts)]))


@pytest.mark.parametrize("name", ["missing.txt", "missing/*.txt"])
def test_a_missing_source_is_named(tmp_path, name):
    with pytest.raises(InputError, match=r"no such file, folder or pattern: .*missing"):
        read_sources([str(tmp_path / name)])


def test_sources_without_text_are_refused(texts):
    with pytest.raises(InputError, match=r"no text in .*empty\.txt: there is no file"):
        read_sources([str(texts / "empty.txt")])


def test_an_unreadable_file_is_named():
    # A file that not even the superuser can read from its start.
    with pytest.raises(InputError, match="cannot read /proc/self/mem: Input/output error"):
        read_sources(["/proc/self/mem"])


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is a pipe or a device; read it as standard input: - < "):
        read_sources([str(tmp_path / "pipe")])


@pytest.mark.parametrize("source", ["", "hf://", "hf://@default:train"])
def test_an_empty_source_is_not_the_current_folder(texts, monkeypatch, source):
    monkeypatch.chdir(texts)
    with pytest.raises(InputError, match=r"a source is empty|names no dataset"):
        read_sources([source])
