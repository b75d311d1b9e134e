"""Stored sessions: nothing is lost, and nobody sees another's."""

import json
import sqlite3
import subprocess
import sys
import threading

import pytest
import torch
from serving import ENDLESS, KEYS, in_process

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
def test_what_is_saved_is_loaded_bit_for_bit(store, path):
    sessions = store() if path else store(None)
    stored = some()
    sessions.save("me", "a", stored)
    loaded = sessions.load("me", "a")
    assert torch.equal(loaded.state, stored.state)
    assert (loaded.token, loaded.position) == (65, 7)
    assert sessions.load("me", "b") is sessions.load("you", "a") is None


def test_sessions_survive_a_killed_process(store, tmp_path):
    path = tmp_path / "sessions.sqlite"
    code = (
        "import os, sys, torch; from pathlib import Path; from mhesa.serve.sessions import *\n"
        f"s = Sessions(Path(sys.argv[1]), model='model', shape={SHAPE}, limits=Limits())\n"
        f"for i in range(50): s.save('me', str(i), SessionState(torch.full({SHAPE}, float(i)), i, i))\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], timeout=120).returncode == -9
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
    store().save("me", "a", some())
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


# Over connections


def session(http, name, prompt, **settings):
    body = {"prompt": prompt, "session": name, "max_tokens": 20, "temperature": 0} | settings
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"] if not body.get("stream") else answer.text


def test_a_session_goes_on_where_it_stopped(http, greedy):
    first = session(http, "one", "Hello")
    second = session(http, "one", " and", stream=True)
    third = session(http, "one", "", max_tokens=10)
    # As text, for as long as it is text.
    prompt = "Hello" + first
    assert first == greedy("Hello", 20)
    if "\ufffd" not in first:
        assert json.dumps(greedy(prompt + " and", 20))[1:5] in second
    found = http.get("/v1/sessions/one").json()
    assert found["position"] == 5 + 20 + 4 + 20 + 10
    assert len(third.encode()) >= 10


def test_a_session_equals_a_text_read_at_once(http):
    ids = list(range(40, 120))
    for cut in (0, 1, 40, 80):
        name = f"cut{cut}"
        session(http, name, bytes(ids[:cut]).decode(), max_tokens=0)
        assert session(http, name, bytes(ids[cut:]).decode()) == session(http, "at-once", bytes(ids).decode())
        http.delete("/v1/sessions/at-once")


def test_sessions_are_listed_forked_and_deleted(http, server):
    session(http, "list-a", "Hello")
    assert http.post("/v1/sessions/list-a/fork", json={"to": "list-b"}).json()["name"] == "list-b"
    assert http.post("/v1/sessions/list-a/fork", json={"to": "list-b"}).status_code == 409
    assert session(http, "list-a", "x") == session(http, "list-b", "x")
    page = http.get("/v1/sessions", params={"after": "list-", "limit": 1}).json()
    assert [one["name"] for one in page["data"]] == ["list-a"]
    assert page["has_more"]
    with server.client(KEYS["bob"]) as other:
        assert other.get("/v1/sessions").json()["data"] == []
        for answer in (
            other.get("/v1/sessions/list-a"),
            other.delete("/v1/sessions/list-a"),
            other.post("/v1/sessions/list-a/fork", json={"to": "mine"}),
        ):
            assert answer.status_code == 404
        session(other, "list-a", "not the same")
    assert http.delete("/v1/sessions/list-a").json()["deleted"]
    assert http.get("/v1/sessions/list-a").status_code == 404
    with server.client(KEYS["bob"]) as other:
        assert other.get("/v1/sessions/list-a").status_code == 200


def test_a_session_in_use_is_refused_and_a_disconnect_leaves_it(http, server):
    session(http, "busy", "Hello")
    before = http.get("/v1/sessions/busy").json()["position"]
    body = {"prompt": "", "session": "busy", "max_tokens": ENDLESS, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as endless:
        lines = endless.iter_lines()
        next(lines)
        answer = http.post("/v1/completions", json={"prompt": "", "session": "busy"})
        assert answer.status_code == 409, answer.text
        assert answer.json()["error"]["code"] == "session_in_use"
    server.wait_for("mhesa_texts_active", 0)
    assert http.get("/v1/sessions/busy").json()["position"] == before


def test_sessions_survive_a_restart(folder, tmp_path):
    texts = []
    for run in range(2):
        with in_process(folder, sessions=tmp_path / "s.sqlite") as http:
            if run == 0:
                session(http, "kept", "Hello")
                http.post("/v1/sessions/kept/fork", json={"to": "again"})
            texts.append(session(http, ["kept", "again"][run], "x"))
    assert texts[0] == texts[1]
