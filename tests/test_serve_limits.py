"""A server that is crowded, kept waiting or told to stop."""

import io
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection

import httpx
import numpy as np
import psutil
import pytest
import torch
from commands import FORKED
from serving import ENDLESS, FOREVER, HEAD, KEYS, in_process, raw, run_server, running, url_of, wait_for

from mhesa import Sampling, generate
from mhesa.inference.decoder import Decoder
from mhesa.inference.slots import Slots
from mhesa.model.loading import load
from mhesa.serve.http import server as http_server
from mhesa.serve.logs import log

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", autouse=True)
def idle(server):
    """A connection that has been used, and when; opened before all tests here, to be idle while they run."""
    with closing(HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("GET", "/health")
        assert json.load(connection.getresponse()) == {"status": "ok"}
        yield connection, time.monotonic()


def serve_without_drawing(folder, log):
    def fail(*args):
        raise RuntimeError("no tokens today")

    Slots.draw = fail
    run_server(folder, {"keys": KEYS}, dict(os.environ), log)


def test_a_server_ends_with_its_decode_thread(folder, tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    process = FORKED.Process(target=serve_without_drawing, args=(folder, str(log)))
    process.start()
    headers = {"Authorization": f"Bearer {KEYS['alice']}"}
    url = url_of(process.is_alive, log)
    body = {"prompt": ["x", "y", "z"]}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the model failed")
    process.join(30)
    assert process.exitcode == 1
    assert "the decode thread failed" in log.read_text()


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
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 17_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"\0\xff nonsense\r\n\r\n", 400, "invalid_http"),
        (b"\0" * 100_000, 400, "invalid_http"),
        (b"GET /\r\n HTTP/1.1\r\n\r\n", 400, "invalid_http"),
    ],
    ids=["header", "path", "headers", "whole", "bytes", "many bytes", "line"],
)
def test_requests_that_are_not_http_are_refused(server, data, status, code):
    answer = raw(server, data)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == code
    refused = [event for event in server.events() if event["event"] == "refused"]
    assert (refused[-1]["status"], refused[-1]["code"]) == (status, code)


def test_bytes_after_a_request_close_the_connection(server):
    body = json.dumps({"prompt": "x", "max_tokens": 5}).encode()
    request = HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    answer = raw(server, request.encode() + body + b"\0 nonsense\r\n\r\n")
    assert b"HTTP/1.1 400 " in answer


def serve_with_short_keep_alive(folder, log):
    http_server.KEEP_ALIVE_SECONDS = 1
    run_server(folder, {"keys": KEYS}, dict(os.environ), log)


def test_line_ends_do_not_keep_an_idle_connection(folder, tmp_path):
    log = tmp_path / "log"
    log.write_text("")
    process = FORKED.Process(target=serve_with_short_keep_alive, args=(folder, str(log)), daemon=True)
    process.start()
    address = url_of(process.is_alive, log).removeprefix("http://").split(":")
    with ExitStack() as stack:
        stack.callback(process.kill)
        for data in (b"", b"\n", b"\r\n\r\n"):
            connection = stack.enter_context(socket.create_connection(address, timeout=30))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(65536)
            connection.sendall(data)
            # The server closes it; without an end this raises TimeoutError.
            assert connection.recv(65536) == b""


def test_refusal_reaches_a_client_that_goes_on_sending(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /" + b"y" * 100_000)
        # The answer has come.
        assert select.select([connection], [], [], 60)[0]
        for _ in range(10):
            connection.sendall(b"y" * 100_000)
            time.sleep(0.01)
        received = b""
        while part := connection.recv(65536):
            received += part
    assert received.startswith(b"HTTP/1.1 431 ")
    assert received.endswith(b"}")


def test_slow_senders_are_disconnected(server):
    parts = [b"", b"GET / HTTP/1.1\r\nHost:", (HEAD + "Content-Length: 100\r\n\r\n{").encode()]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda part: raw(server, part), parts)) == [b""] * 3
    # The first of them has sent nothing.
    assert [event["code"] for event in server.events() if event["event"] == "cut"].count("slow_request") >= 2


def test_slow_reader_is_disconnected(folder, tmp_path):
    body = json.dumps(FOREVER | {"stream": True, "logprobs": 20}).encode()
    limits = {"max_tokens": ENDLESS, "logprob_entries": 21 * ENDLESS, "send_seconds": 1.0}
    with running(folder, tmp_path / "log", limits=limits) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = server.url.removeprefix("http://").split(":")
        connection.connect((host, int(port)))
        head = HEAD + f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_for("mhesa_texts_active", 1)
        server.wait_for("mhesa_texts_active", 0)
        events = server.events()
    assert [event["code"] for event in events if event["event"] == "cut"] == ["answer_not_read"]
    assert [event["cut"] for event in events if "cut" in event] == ["disconnected"]


def test_a_stream_has_no_more_logprobs_than_an_answer(http):
    """They are in memory until the client reads them."""
    for stream in (False, True):
        body = {"prompt": "x", "n": 8, "max_tokens": 4096, "logprobs": 20, "stream": stream}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("logprobs in one answer: at most 262,144")


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


def test_long_requests_time_out(folder):
    limits = {"max_tokens": ENDLESS, "request_seconds": 0.5}
    with in_process(folder, limits=limits) as http:
        answer = http.post("/v1/completions", json=FOREVER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        streamed = http.post("/v1/completions", json=FOREVER | {"stream": True})
        assert streamed.status_code == 200
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        wait_for(http, "mhesa_texts_active", 0)


# Large requests

WORDS = ("some words of a line that is not long\nand more, 123;\n" * 20_000)[: 960 * 1024]
# Each is legal, or wrong in the costliest way that fits into a body.
LARGE = {
    "lines": ("/v1/score", json.dumps({"input": WORDS[:100_000] + "\n" * 50_000}), 200),
    "tokens": ("/v1/score", json.dumps({"input": WORDS, "by": "token"}), 400),
    "many texts": ("/v1/score", json.dumps({"input": [WORDS[:1000]] * 120, "by": "line"}), 200),
    "penalty": (
        "/v1/completions",
        json.dumps({"prompt": WORDS[:200_000], "repetition_penalty": 1.1, "n": 16, "max_tokens": 2}),
        200,
    ),
    "echo": ("/v1/completions", json.dumps({"prompt": WORDS[:200_000], "echo": True, "max_tokens": 1}), 200),
    "ids": ("/v1/completions", '{"max_tokens":1,"prompt":[' + "1," * 300_000 + "1]}", 200),
    "prompts": ("/v1/completions", '{"prompt":[' + "{}," * 349_000 + "{}]}", 400),
    "lists": ("/v1/completions", '{"prompt":[' + "[1]," * 250_000 + "[]]}", 400),
    "last id": ("/v1/completions", '{"prompt":[' + "1," * 500_000 + "{}]}", 400),
    "numbers": ("/v1/completions", '{"prompt":[' + "1.5," * 250_000 + "1]}", 400),
    "messages": ("/v1/chat/completions", '{"messages":[' + "1," * 500_000 + "1]}", 400),
    "parts": ("/v1/chat/completions", '{"messages":[{"role":"x","content":[' + "1," * 500_000 + "1]}]}", 400),
    "modalities": ("/v1/chat/completions", '{"messages":[],"modalities":[' + "1," * 500_000 + "1]}", 400),
    "stops": ("/v1/completions", '{"stop":[' + "1," * 500_000 + "1]}", 400),
    "texts": ("/v1/score", '{"input":[' + "1.5," * 250_000 + "1]}", 400),
    "fields": ("/v1/completions", json.dumps({f"{index}": 1 for index in range(80_000)}), 400),
    "inner fields": (
        "/v1/chat/completions",
        json.dumps({"messages": [{f"{index}": 1 for index in range(80_000)}]}),
        400,
    ),
    "biases": (
        "/v1/completions",
        json.dumps({"logit_bias": {f"{index}": "x" for index in range(60_000)}}),
        400,
    ),
    "a name": ("/v1/completions", '{"' + "n" * 1_000_000 + '":1}', 400),
    "a number": ("/v1/completions", '{"n":' + "1" * 1_000_000 + "}", 400),
    "depth": ("/v1/completions", '{"prompt":' + "[" * 1_000_000, 400),
}


def test_no_large_request_stops_others_or_leaves_memory_behind(folder, tmp_path):
    with running(folder, tmp_path / "log") as server, server.client() as http, server.client() as other:
        process, http.timeout = psutil.Process(server.process.pid), 600
        http.post("/v1/completions", json={"prompt": "x", "n": 16, "echo": True, "logprobs": 2})
        http.post("/v1/score", json={"input": "x" * 2000})
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4096, "stream": True})
        idle, most, waited = process.memory_info().rss, [0], {}
        done, gaps = threading.Event(), [0.0]
        beside = [
            threading.Thread(target=measure, args=(process, most, done)),
            threading.Thread(target=stream_on, args=(server, gaps, done)),
        ]
        for one in beside:
            one.start()
        with ThreadPoolExecutor(1) as thread:
            for name, (path, body, status) in LARGE.items():
                gaps.append(0.0)
                answer = thread.submit(http.post, path, content=body, headers=JSON)
                times = []
                while not answer.done():
                    started = time.monotonic()
                    assert other.get("/health").status_code == 200
                    times.append(time.monotonic() - started)
                    time.sleep(0.02)
                waited[name] = max(times, default=0), gaps[-1]
                assert answer.result().status_code == status, (name, answer.result().text[:500])
                if status == 400:
                    error = answer.result().json()["error"]["message"]
                    assert "\n" not in error
                    assert len(error) < 500
        done.set()
        for one in beside:
            one.join()
        print(f"memory {(most[0] - idle) / 1e6:.0f} MB above idle; seconds of /health, and between texts:")
        print(waited)
        # Each took 4 to 50 s before; far below that also on a machine kept busy by other tests.
        assert max(map(max, waited.values())) < 2, waited
        assert most[0] - idle < 200e6
        until = time.monotonic() + 60
        while (kept := process.memory_info().rss - idle) > 20e6 and time.monotonic() < until:
            time.sleep(0.1)
        assert kept <= 20e6


def stream_on(server, gaps, done):
    """Read one stream after another; the last of `gaps` is the longest time between two of its texts."""
    body = {"prompt": "x", "max_tokens": 4096, "temperature": 0, "stream": True}
    with server.client(KEYS["bob"]) as client:
        while not done.is_set():
            with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                last = None
                for line in answer.iter_lines():
                    now = time.monotonic()
                    if line.startswith("data: {"):
                        gaps[-1] = max(gaps[-1], now - (last or now))
                        last = now
                    if done.is_set():
                        break


def measure(process, most, done):
    while not done.wait(0.02):
        most[0] = max(most[0], process.memory_info().rss)


@pytest.fixture(scope="module")
def inside(folder):
    with in_process(folder, keys={}, key=None) as http:
        yield http


@pytest.mark.parametrize("by", ["line", "text"])
def test_a_large_score_is_the_models_surprisal(inside, folder, by):
    text = WORDS[:100_000] + "\n" * 2000 + "é" * 20_000
    model, _ = load(folder)
    ids = torch.tensor([256, *text.encode()])
    bits = Decoder(model).surprisal(ids[:-1], ids[1:], model.initial_state(1))
    answer = inside.post("/v1/score", json={"input": [text, "", text], "by": by})
    assert answer.status_code == 200, answer.text
    first, empty, last = answer.json()["data"]
    assert (empty["items"], empty["bits_per_byte"]) == ([], None)
    assert {**first, "index": 2} == last
    assert first["bytes"] == len(text.encode())
    assert np.isclose(first["bits"], bits.sum(dtype=np.float64), rtol=1e-5)
    parts = text.splitlines(keepends=True) if by == "line" else [text]
    assert [item["text"] for item in first["items"]] == parts
    ends = np.cumsum([len(part.encode()) for part in parts])
    expected = np.diff(np.concatenate([[0.0], np.cumsum(bits, dtype=np.float64)])[[0, *ends]])
    assert np.allclose([item["bits"] for item in first["items"]], expected, rtol=1e-4, atol=1e-3)


def test_a_large_prompt_is_read_and_given_back_as_a_small_one(inside, folder):
    prompt = WORDS[:150_000] + "é" * 100
    model, _ = load(folder)
    ids = torch.tensor([256, *prompt.encode()])
    texts = generate(
        model,
        [ids, ids],
        max_new_tokens=9,
        sampling=Sampling(repetition_penalty=2.5, temperature=0.5),
        seed=3,
    )
    body = {
        "prompt": prompt,
        "n": 2,
        "seed": 3,
        "repetition_penalty": 2.5,
        "temperature": 0.5,
        "max_tokens": 9,
    }
    for settings in ({}, {"echo": True}, {"prompt": ids[1:].tolist()}):
        choices = inside.post("/v1/completions", json=body | settings).json()["choices"]
        streamed = inside.post("/v1/completions", json=body | settings | {"stream": True}).text
        events = [json.loads(event.removeprefix("data: ")) for event in streamed.split("\n\n")[:-2]]
        for index, ids_of_text in enumerate(texts):
            expected = bytes(token for token in ids_of_text.tolist() if token < 256).decode(
                "utf-8", "replace"
            )
            if "echo" in settings:
                expected = prompt + expected
            assert choices[index]["text"] == expected
            own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == expected


def test_large_answers_are_refused_before_they_are_made(inside):
    for body in (
        {"prompt": "x" * 100_000, "echo": True, "n": 16},
        {"prompt": "x", "n": 128, "max_tokens": 4096, "logprobs": 20},
        {"prompt": ["x" * 5000] * 10, "n": 2, "echo": True, "logprobs": 5, "max_tokens": 0},
    ):
        answer = inside.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "limit_exceeded"), answer.text
    stream = {
        "prompt": "x",
        "n": 2,
        "max_tokens": 4096,
        "logprobs": 20,
        "stream": True,
        "stop": ["a", "e", " "],
    }
    assert inside.post("/v1/completions", json=stream).status_code == 200


# Signals and logs


def test_sigterm_ends_a_server_whose_log_nobody_reads(folder):
    """The command itself, whose interpreter shuts down in the end."""
    command = [sys.executable, "-m", "mhesa", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        url = next(json.loads(line)["url"] for line in process.stderr if b'"listening"' in line)
        with httpx.Client(base_url=url) as http:
            # More lines than a pipe takes, then a broken pipe.
            for _ in range(500):
                assert http.get("/v1/models").status_code == 200
            process.stderr.close()
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
        process.terminate()
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()


def test_a_log_line_never_raises_or_waits(monkeypatch):
    read, write = os.pipe()
    with suppress(BrokenPipeError), os.fdopen(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log("first", text="x" * 10_000)
        for index in range(10_000):
            log("line", index=index)
        lines = []
        while b'"dropped"' not in b"".join(lines):
            lines.append(os.read(read, 1 << 20))
            log("again")
        found = [json.loads(line) for line in b"".join(lines).splitlines()]
        written = [line["index"] for line in found if line["event"] == "line"]
        assert written == list(range(len(written)))
        assert found[-1]["dropped"] >= 10_000 - len(written)
        assert len(found[0]["text"]) < 4096
        os.close(read)
        log("broken")
    log("closed")
    for nothing in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stderr", nothing)
        log("line")
    assert json.loads(nothing.getvalue())["dropped"] == 2


def test_a_second_signal_ends_requests_in_order(folder, tmp_path):
    with running(folder, tmp_path / "log", limits={"max_tokens": ENDLESS}) as server:
        with ThreadPoolExecutor() as pool, server.client() as http:
            answer = pool.submit(http.post, "/v1/completions", json=FOREVER)
            server.wait_for("mhesa_texts_active", 1)
            server.process.terminate()
            time.sleep(0.3)
            server.process.terminate()
            assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (
                503,
                "shutting_down",
            )
        server.process.join(10)
        assert server.process.exitcode == 0
    assert "fault" not in (tmp_path / "log").read_text()


def test_sigterm_lets_streams_finish_and_tells_the_rest(folder, tmp_path):
    limits = {"max_tokens": ENDLESS, "drain_seconds": 1}
    with running(folder, tmp_path / "log", limits=limits, slots=128) as server:
        ends, begun = {}, threading.Event()

        def read(index, tokens):
            body = {"prompt": "x", "max_tokens": tokens, "stream": True, "seed": index}
            with server.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
                for line in filter(None, answer.iter_lines()):
                    ends[index] = line
                    if index == 99:
                        begun.set()

        threads = [threading.Thread(target=read, args=(index, ENDLESS)) for index in range(20)]
        for thread in threads:
            thread.start()
        server.wait_for("mhesa_texts_active", 20)
        finishing = threading.Thread(target=read, args=(99, 200))
        finishing.start()
        assert begun.wait(30)
        with server.client() as http:
            http.get("/health")
            server.process.terminate()
            time.sleep(0.5)
            with pytest.raises(httpx.HTTPError):
                server.client().get("/health")
        for thread in [*threads, finishing]:
            thread.join(30)
        server.process.join(30)
        assert server.process.exitcode == 0
    told = [json.loads(ends[index].removeprefix("data: "))["error"]["code"] for index in range(20)]
    assert told == ["shutting_down"] * 20
    assert ends[99] == "data: [DONE]"
    assert [event["event"] for event in server.events()][-1] == "stopped"


def test_an_idle_connection_stays_open(idle):
    connection, used = idle
    # Uvicorn's own limit is 5 seconds, ours for an unfinished request is 1 here.
    time.sleep(max(used + 6 - time.monotonic(), 0))
    connection.request("GET", "/health")
    assert json.load(connection.getresponse()) == {"status": "ok"}
