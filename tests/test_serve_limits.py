"""A server that is crowded, kept waiting or told to stop."""

import json
import signal
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest
from serving import ENDLESS, FOREVER, HEAD, KEYS, in_process, raw, running, wait_for

# Limits of connections


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, http):
    answer = raw(server, (HEAD + f"Content-Length: {1 << 30}\r\n\r\n").encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer
    chunks = (b"x" * 65536 for _ in range(32))
    assert http.post("/v1/completions", content=chunks).status_code == 413
    for path in ("/v1/completions", "/v1/score") * 5:
        assert http.post(path, content=b"x" * 3_000_000).status_code == 413


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000, 431, "headers_too_large"),
        (b"GET /" + b"y" * 100_000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 20_000, 431, "headers_too_large"),
        (b"\0\xff nonsense\r\n\r\n", 400, "invalid_http"),
        (b"GET /\r\n HTTP/1.1\r\n\r\n", 400, "invalid_http"),
    ],
    ids=["header", "path", "headers", "bytes", "line"],
)
def test_what_is_no_http_is_refused(server, data, status, code):
    answer = raw(server, data)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == code


@pytest.mark.parametrize("part", ["", "GET / HTTP/1.1\r\nHost:", HEAD + "Content-Length: 100\r\n\r\n{"])
def test_who_sends_slowly_is_cut_off(server, part):
    assert raw(server, part.encode()) == b""


def test_who_does_not_read_is_cut_off_and_holds_nothing(server):
    body = json.dumps(FOREVER | {"stream": True, "logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        head = HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_for("mhesa_texts_active", 1)
        server.wait_for("mhesa_texts_active", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnect_frees_the_slot(server, stream):
    body = json.dumps(FOREVER | {"stream": stream, "n": 4}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_for("mhesa_texts_active", 4)
    server.wait_for("mhesa_texts_active", 0)


def test_a_full_queue_answers_429_and_when_to_come_again(folder, tmp_path):
    limits = {"max_tokens": ENDLESS, "drain_seconds": 0.5}
    with running(folder, tmp_path / "log", limits=limits, slots=1, queue=2) as server:
        body = FOREVER
        with server.client() as http, server.client(KEYS["bob"]) as bob:
            threads = [threading.Thread(target=_quietly, args=(http, body)) for _ in range(2)]
            for thread in threads:
                thread.start()
            server.wait_for("mhesa_texts_waiting", 1)
            answer = http.post("/v1/completions", json={"prompt": "y"})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            # Another client still has room.
            late = threading.Thread(target=_quietly, args=(bob, body))
            late.start()
            server.wait_for("mhesa_texts_waiting", 2)
            server.process.terminate()
            for thread in [*threads, late]:
                thread.join(40)


def _quietly(http, body):
    with suppress(httpx.HTTPError):
        http.post("/v1/completions", json=body)


def test_what_takes_too_long_is_ended(folder):
    limits = {"max_tokens": ENDLESS, "request_seconds": 0.5}
    with in_process(folder, limits=limits) as http:
        answer = http.post("/v1/completions", json=FOREVER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        streamed = http.post("/v1/completions", json=FOREVER | {"stream": True})
        assert streamed.status_code == 200
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_for(http, "mhesa_texts_active", 0)


# Signals and logs


def test_sigterm_lets_streams_finish_and_tells_the_rest(folder, tmp_path):
    limits = {"max_tokens": ENDLESS, "drain_seconds": 6}
    with running(folder, tmp_path / "log", limits=limits, slots=128) as server:
        ends = {}

        def read(index, tokens):
            with server.client() as http:
                body = {"prompt": "x", "max_tokens": tokens, "stream": True, "seed": index}
                ends[index] = http.post("/v1/completions", json=body).text.strip().split("\n\n")[-1]

        threads = [threading.Thread(target=read, args=(index, ENDLESS)) for index in range(20)]
        for thread in threads:
            thread.start()
        server.wait_for("mhesa_texts_active", 20)
        finishing = threading.Thread(target=read, args=(99, 2000))
        finishing.start()
        server.wait_for("mhesa_texts_active", 21)
        with server.client() as http:
            http.get("/health")
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            with pytest.raises(httpx.HTTPError):
                server.client().get("/health")
        for thread in [*threads, finishing]:
            thread.join(30)
        assert server.process.wait(30) == 0
    told = [json.loads(ends[index].removeprefix("data: "))["error"]["code"] for index in range(20)]
    assert told == ["shutting_down"] * 20
    assert ends[99] == "data: [DONE]"
    assert [event["event"] for event in server.events()][-1] == "stopped"
