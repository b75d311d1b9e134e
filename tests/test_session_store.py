"""The store of sessions: nothing is lost, and nobody sees another's."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from commands import FORKED
from serving import locked

from mhesa.errors import InputError
from mhesa.inference.session import SessionState
from mhesa.serve.sessions import SessionError, Sessions
from mhesa.serve.settings import Limits

SHAPE = (3, 1, 5)


class Clock:
    now = 1e9

    def __call__(self):
        return self.now


@pytest.fixture
def store(tmp_path):
    opened = []

    def open_store(path=tmp_path / "sessions.sqlite", model="model", **settings):
        opened.append(Sessions(path, model=model, shape=SHAPE, **{"limits": Limits()} | settings))
        return opened[-1]

    yield open_store
    for one in opened:
        one.close()


def some(position=7):
    return SessionState(torch.randn(SHAPE), 65, position)


@pytest.mark.parametrize("path", [None, "file"])
def test_saved_states_are_loaded_bit_for_bit(store, path):
    sessions = store() if path else store(None)
    stored = some()
    sessions.save("me", "a", stored)
    loaded = sessions.load("me", "a")
    assert torch.equal(loaded.state, stored.state)
    assert (loaded.token, loaded.position) == (65, 7)
    assert sessions.load("me", "b") is sessions.load("you", "a") is None


def save_fifty_and_die(path):
    sessions = Sessions(path, model="model", shape=SHAPE, limits=Limits())
    for index in range(50):
        sessions.save("me", str(index), SessionState(torch.full(SHAPE, float(index)), index, index))
    os.kill(os.getpid(), signal.SIGKILL)


def test_sessions_survive_a_killed_process(store, tmp_path):
    process = FORKED.Process(target=save_fifty_and_die, args=(tmp_path / "sessions.sqlite",))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    sessions = store()
    assert sessions.size() == (50, 50 * 60)
    assert all((sessions.load("me", str(index)).state == index).all() for index in range(50))


def test_forks_go_on_apart(store):
    sessions = store()
    first = some()
    sessions.save("me", "a", first)
    sessions.fork("me", "a", "b")
    sessions.save("me", "a", some(9))
    assert torch.equal(sessions.load("me", "b").state, first.state)
    with pytest.raises(SessionError, match="exists already") as error:
        sessions.fork("me", "a", "b")
    assert error.value.status == 409
    with pytest.raises(SessionError, match="no session c"):
        sessions.fork("me", "c", "d")
    with pytest.raises(SessionError, match="no session a"):
        sessions.fork("you", "a", "d")


def test_lists_are_of_one_client_and_in_pages(store):
    sessions = store()
    for name in "cab":
        sessions.save("me", name, some())
    sessions.save("you", "z", some())
    assert [one.name for one in sessions.page("me")] == ["a", "b", "c"]
    assert [one.name for one in sessions.page("me", after="a", limit=1)] == ["b"]
    assert sessions.get("me", "a").bytes == 60
    assert sessions.get("me", "z") is None
    assert not sessions.delete("me", "z")
    assert sessions.delete("you", "z")
    assert sessions.page("you") == []


def test_sessions_expire(store):
    clock = Clock()
    sessions = store(limits=Limits(idle_seconds=100), clock=clock)
    sessions.save("me", "old", some())
    clock.now += 60
    sessions.save("me", "new", some())
    assert sessions.get("me", "new").expires == clock.now + 100
    clock.now += 50
    assert sessions.load("me", "old") is None
    assert [one.name for one in sessions.page("me")] == ["new"]
    assert sessions.expire() == 1
    assert sessions.size() == (1, 60)


def test_a_client_has_so_many_sessions(store):
    sessions = store(limits=Limits(sessions=2))
    for name in "aba":
        sessions.save("me", name, some())
    for grow in (lambda: sessions.save("me", "c", some()), lambda: sessions.fork("me", "a", "c")):
        with pytest.raises(SessionError, match="2 sessions already") as error:
            grow()
        assert error.value.status == 429
    sessions.save("you", "c", some())
    sessions.delete("me", "a")
    sessions.save("me", "c", some())


def test_another_models_sessions_are_refused(store):
    sessions = store()
    sessions.save("me", "a", some())
    sessions.close()
    with pytest.raises(SessionError, match="another model"):
        store(model="other").load("me", "a")


@pytest.mark.parametrize("damage", [b"", b"\0" * 7, b"\xff" * 60])
def test_a_damaged_state_is_refused(store, tmp_path, damage):
    sessions = store()
    sessions.save("me", "a", some())
    with sqlite3.connect(tmp_path / "sessions.sqlite") as database:
        database.execute("UPDATE sessions SET state = ?", (damage,))
    with pytest.raises(SessionError, match="damaged"):
        sessions.load("me", "a")


@pytest.mark.parametrize("content", [b"text, and no database at all", None])
def test_a_file_of_something_else_is_left_alone(store, tmp_path, content):
    path = tmp_path / "other"
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE mine (x)")
        database.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot keep sessions in"):
        store(path)
    assert path.read_bytes() == before


def test_a_path_that_cannot_be_a_database_is_refused(store, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InputError, match="is a folder, a device or a pipe"):
            store(path)
    with pytest.raises(InputError, match=r"cannot write to .*: No such file"):
        store(tmp_path / "none" / "sessions.sqlite")


def test_a_second_user_of_a_file_is_told_who_has_it(store, tmp_path):
    sessions = store()
    sessions.save("me", "a", some())
    (tmp_path / "link").symlink_to(tmp_path / "sessions.sqlite")
    for path in (tmp_path / "sessions.sqlite", tmp_path / "link"):
        with pytest.raises(InputError, match=f"is being written by process {os.getpid()} on "):
            store(path)
    assert sessions.load("me", "a").position == 7
    sessions.close()
    assert store(tmp_path / "link").load("me", "a").position == 7


# Trouble with the file


def check_unavailable(use, message):
    with pytest.raises(SessionError, match=message) as error:
        use()
    assert error.value.status == 503


def test_a_locked_database_is_told_and_used_again_later(store, tmp_path):
    sessions = store()
    first, second = some(1), some(2)
    sessions.save("me", "a", first)
    with locked(tmp_path / "sessions.sqlite"):
        for _ in range(3):
            check_unavailable(lambda: sessions.save("me", "a", second), "database is locked")
        check_unavailable(lambda: sessions.fork("me", "a", "b"), "database is locked")
        check_unavailable(sessions.expire, "database is locked")
        assert torch.equal(sessions.load("me", "a").state, first.state)
    sessions.save("me", "a", second)
    assert torch.equal(sessions.load("me", "a").state, second.state)


def test_a_full_database_keeps_its_sessions_and_is_used_again_later(store):
    sessions = store()
    sessions._database.execute("PRAGMA max_page_count = 12")
    kept = {}

    def fill():
        for index in range(1000):
            stored = some(index)
            sessions.save("me", str(index), stored)
            kept[str(index)] = stored.state

    check_unavailable(fill, "disk is full")
    assert kept
    assert all(torch.equal(sessions.load("me", name).state, state) for name, state in kept.items())
    assert len(sessions.page("me", limit=1000)) == len(kept)
    sessions._database.execute("PRAGMA max_page_count = 10000")
    sessions.save("me", "more", some())
    assert sessions.size()[0] == len(kept) + 1


def test_a_damaged_database_is_told_and_used_again_once_it_is_mended(store, tmp_path):
    path = tmp_path / "sessions.sqlite"
    sessions = store()
    for index in range(200):
        sessions.save("me", f"{index:03}", some(index))
    sessions.close()
    whole = path.read_bytes()
    # All but the first page, which says what the file is.
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    sessions = store()
    for _ in range(2):
        check_unavailable(lambda: sessions.load("me", "100"), "malformed")
        check_unavailable(lambda: sessions.save("me", "new", some()), "malformed")
    path.write_bytes(b"something else entirely" * 1000)
    check_unavailable(lambda: sessions.load("me", "100"), "not a database")
    path.write_bytes(whole)
    assert [sessions.load("me", f"{index:03}").position for index in range(200)] == list(range(200))


@pytest.mark.parametrize("gone", ["file", "all", "log", "moved"])
def test_a_database_that_is_deleted_is_written_again(store, tmp_path, gone):
    path = tmp_path / "sessions.sqlite"
    sessions, stored = store(), {str(index): some(index) for index in range(20)}
    for name, state in stored.items():
        sessions.save("me", name, state)
    if gone == "moved":
        path.rename(tmp_path / "elsewhere")
    for suffix in {"file": [""], "all": ["", "-wal", "-shm"], "log": ["-wal"], "moved": []}[gone]:
        Path(f"{path}{suffix}").unlink()
    check_unavailable(lambda: sessions.save("me", "0", some()), "deleted or replaced")
    sessions.save("me", "new", some())
    # What is there is in the file, too.
    code = (
        "import sqlite3, sys; names = sqlite3.connect(sys.argv[1]).execute('SELECT name FROM sessions')\n"
        "print(*sorted(name for name, in names))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60
    )
    assert found.stdout.split() == sorted([*stored, "new"])
    assert all(torch.equal(sessions.load("me", name).state, one.state) for name, one in stored.items())


def test_a_missing_folder_is_reported_and_loses_no_session(store, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    sessions = store(folder / "s.sqlite")
    sessions.save("me", "a", some())
    folder.rename(tmp_path / "away")
    for _ in range(2):
        check_unavailable(lambda: sessions.load("me", "a"), "unable to open database file")
    folder.mkdir()
    check_unavailable(lambda: sessions.load("me", "a"), "deleted or replaced")
    assert sessions.load("me", "a").position == 7


def test_a_file_that_is_replaced_is_taken_if_it_is_ours(store, tmp_path):
    path, spare = tmp_path / "sessions.sqlite", tmp_path / "spare"
    other = store(spare)
    other.save("me", "a", some(1))
    other.close()
    sessions = store()
    sessions.save("me", "a", some(2))
    # Something else is left alone, and nothing is lost by it.
    foreign = tmp_path / "foreign"
    foreign.write_bytes(b"text, and no database at all")
    foreign.replace(path)
    for _ in range(2):
        check_unavailable(lambda: sessions.load("me", "a"), "another file is in the place")
    assert path.read_bytes() == b"text, and no database at all"
    path.unlink()
    check_unavailable(lambda: sessions.load("me", "a"), "deleted or replaced")
    assert sessions.load("me", "a").position == 2
    spare.replace(path)
    check_unavailable(lambda: sessions.load("me", "a"), "deleted or replaced")
    assert sessions.load("me", "a").position == 1


def test_threads_may_share_a_store(store):
    sessions = store()

    def work(client):
        for index in range(50):
            sessions.save(client, str(index % 5), some(index))
            assert sessions.load(client, str(index % 5)).position == index

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sessions.size()[0] == 20
