"""One writer at a time."""

import os
import threading

import pytest
from commands import FORKED

from mhesa.errors import InputError
from mhesa.locks import only_writer_of_file, only_writer_of_folder

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


def test_what_cannot_be_locked_is_named(tmp_path):
    (tmp_path / "file").write_text("text")
    assert refusal(tmp_path / "file") == f"{tmp_path / 'file'} is a file; give a folder to save to"
    assert refusal(tmp_path / "file" / "below").startswith(f"cannot write to {tmp_path / 'file' / 'below'}")
    (tmp_path / ".lock").symlink_to("file")
    assert refusal(tmp_path).startswith(f"cannot write to {tmp_path}")
    assert (tmp_path / "file").read_text() == "text"
