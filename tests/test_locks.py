"""One writer at a time."""

import errno
import os
import threading
import time

import pytest
from commands import FORKED

from mhesa import locks
from mhesa.errors import InputError
from mhesa.locks import made_once, only_writer_of_file, only_writer_of_folder

ROUNDS = 100


def hold(folder, pipe):
    with only_writer_of_folder(folder):
        pipe.send(os.getpid())
        pipe.recv()


@pytest.fixture
def holder():
    """Start a process that holds the lock of a folder: itself, and its pipe."""
    started = []

    def start(folder):
        mine, its = FORKED.Pipe()
        process = FORKED.Process(target=hold, args=(folder, its))
        process.start()
        started.append(process)
        assert mine.recv() == process.pid
        return process, mine

    yield start
    for process in started:
        process.kill()
        process.join()


def refusal(folder):
    with pytest.raises(InputError) as caught, only_writer_of_folder(folder):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_process_is_told_who_writes(holder, tmp_path):
    folder = tmp_path / "new" / "run"
    process, pipe = holder(folder)
    assert f"{folder} is being written by process {process.pid} on {os.uname().nodename};" in refusal(folder)
    pipe.send("end")
    process.join()
    # What was made for the lock alone is gone.
    assert list(tmp_path.iterdir()) == []
    with only_writer_of_folder(folder):
        assert f"process {os.getpid()}" in refusal(folder)


def test_a_lock_of_a_process_that_died_is_free(holder, tmp_path):
    process, _ = holder(tmp_path)
    process.kill()
    process.join()
    assert (tmp_path / ".lock").exists()
    with only_writer_of_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_only_one_thread_at_a_time_is_in(tmp_path):
    inside, most, entered = 0, 0, 0

    def enter():
        nonlocal inside, most, entered
        for _ in range(ROUNDS):
            try:
                with only_writer_of_file(tmp_path / "file"):
                    inside += 1
                    most = max(most, inside)
                    entered += 1
                    inside -= 1
            except InputError:
                continue

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered > 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} is a file; give a folder"
    assert refusal(tmp_path / "file" / "below").startswith(f"cannot write to {tmp_path / 'file' / 'below'}")
    (tmp_path / ".lock").symlink_to("file")
    assert refusal(tmp_path).startswith(f"cannot write to {tmp_path}")
    assert (tmp_path / "file").read_text() == "text"


# What one process makes for all


def make(marker, made, barrier):
    barrier.wait(60)
    with made_once(marker):
        if not made.exists():
            # Long enough for the others to come.
            time.sleep(0.2)
            with open(made.with_name("makers"), "a") as makers:
                makers.write("x")
            made.write_text("it")


def test_one_of_several_processes_makes_the_file(tmp_path):
    barrier = FORKED.Barrier(4)
    arguments = tmp_path / "new" / "marker", tmp_path / "made", barrier
    processes = [FORKED.Process(target=make, args=arguments, daemon=True) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "makers").read_text() == "x"


def make_and_die(marker):
    with made_once(marker):
        os._exit(9)


def test_after_a_maker_that_fails_the_next_one_makes(tmp_path):
    process = FORKED.Process(target=make_and_die, args=(tmp_path / "marker",))
    process.start()
    process.join()
    assert process.exitcode == 9
    with pytest.raises(KeyError), made_once(tmp_path / "marker"):
        raise KeyError
    assert (tmp_path / "marker").read_bytes() == b""
    with made_once(tmp_path / "marker"):
        pass
    assert (tmp_path / "marker").read_bytes() == b"made"


def test_nobody_waits_for_a_process_that_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_SECONDS", 0.1)
    with made_once(tmp_path / "marker"):
        began = time.monotonic()
        with made_once(tmp_path / "marker"):
            assert time.monotonic() - began >= 0.1


def test_where_files_cannot_be_locked_each_makes_its_own(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "_try_lock", fail)
    with made_once(tmp_path / "marker"), made_once(tmp_path / "marker"):
        pass
    assert (tmp_path / "marker").read_bytes() == b"made"


def test_a_link_in_place_of_a_marker_is_not_followed(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "marker").symlink_to(tmp_path / "file")
    with made_once(tmp_path / "marker"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_where_no_marker_can_be_written_each_makes_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    with made_once(tmp_path / "file" / "marker"), made_once(tmp_path / "file" / "marker"):
        pass
    assert (tmp_path / "file").read_text() == ""
