"""Sessions of a server: nothing is lost, and nobody sees another's."""

import asyncio
import json
import os

import pytest
import uvicorn
from serving import ENDLESS, KEYS, in_process, locked

from mhesa.inference.session import SessionState
from mhesa.model.loading import load
from mhesa.serve.api.service import Service
from mhesa.serve.http import server as server_module
from mhesa.serve.settings import Limits, Settings


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


def check_503(answer):
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.json()["error"]["code"] == "sessions_unavailable"


def test_trouble_with_the_file_is_one_answer_and_loses_no_session(folder, tmp_path):
    path = tmp_path / "s.sqlite"
    body = {"prompt": "x", "session": "a", "max_tokens": 5, "temperature": 0}
    with in_process(folder, sessions=path) as http:
        session(http, "a", "Hello")
        before = http.get("/v1/sessions/a").json()
        with locked(path):
            check_503(http.post("/v1/completions", json=body))
            check_503(http.post("/v1/sessions/a/fork", json={"to": "b"}))
            check_503(http.delete("/v1/sessions/a"))
            streamed = http.post("/v1/completions", json=body | {"stream": True})
            assert streamed.status_code == 200
            *_, text, error = streamed.text.strip().split("\n\n")
            assert json.loads(text.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
            assert json.loads(error.removeprefix("data: "))["error"]["code"] == "sessions_unavailable"
            assert http.get("/v1/sessions/a").json() == before
        path.unlink()
        check_503(http.post("/v1/completions", json=body))
        assert http.get("/v1/sessions/a").json() == before
        path.with_suffix(".new").write_bytes(b"no database")
        path.with_suffix(".new").replace(path)
        for method, url in (("GET", "/v1/sessions"), ("GET", "/v1/sessions/a"), ("DELETE", "/v1/sessions/a")):
            check_503(http.request(method, url))
        # What needs no sessions goes on.
        assert http.get("/metrics").status_code == 200
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        path.unlink()
        check_503(http.get("/v1/sessions"))
        after = session(http, "a", "x")
    with in_process(folder) as http:
        session(http, "a", "Hello")
        assert session(http, "a", "x") == after


def test_a_second_server_of_a_file_is_refused(folder, tmp_path, run):
    path = tmp_path / "s.sqlite"
    with in_process(folder, sessions=path) as http:
        session(http, "a", "Hello")
        code, _, error = run("serve", folder, "--port", 0, "--sessions", path)
        assert code == 2
        assert f"Error: {path} is being written by process {os.getpid()} on " in error.decode()
        session(http, "a", "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [("config.json", "is also an input"), ("", "is a folder, a device or a pipe")],
)
def test_sessions_in_no_file_of_their_own_are_refused(folder, run, name, message):
    before = (folder / "config.json").read_bytes()
    code, _, error = run("serve", folder, "--port", 0, "--sessions", folder / name)
    assert code == 2
    assert message in error.decode()
    assert "Traceback" not in error.decode()
    assert (folder / "config.json").read_bytes() == before


def test_no_copy_takes_the_name_of_a_session_that_is_being_made(http, server):
    session(http, "source", "Hello")
    body = {"prompt": "", "session": "being-made", "max_tokens": ENDLESS, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as endless:
        lines = endless.iter_lines()
        next(lines)
        answer = http.post("/v1/sessions/source/fork", json={"to": "being-made"})
        assert answer.status_code == 409, answer.text
        assert answer.json()["error"]["code"] == "session_in_use"
    server.wait_for("mhesa_texts_active", 0)
    assert http.post("/v1/sessions/source/fork", json={"to": "being-made"}).status_code == 200
    http.delete("/v1/sessions/being-made")


def test_expired_sessions_are_deleted_after_trouble(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "EXPIRE_SECONDS", 0.01)
    path = tmp_path / "s.sqlite"
    service = Service(
        *load(folder), Settings("tiny", keys=KEYS, sessions=path, limits=Limits(idle_seconds=0))
    )

    async def keep_house():
        server = server_module._Server(uvicorn.Config(None), service)
        with locked(path):
            task = asyncio.create_task(server._expire_sessions())
            await asyncio.sleep(2)
        while service.sessions.size()[0]:
            assert not task.done()
            await asyncio.sleep(0.01)
        task.cancel()

    try:
        service.sessions.save("me", "a", SessionState(service.engine.decoder.initial_state(1), 65, 7))
        asyncio.run(asyncio.wait_for(keep_house(), 60))
    finally:
        service.close()
