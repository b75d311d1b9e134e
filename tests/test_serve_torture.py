"""What a server must survive, at full size: `make torture`. Loads stay on this machine and are bounded."""

import asyncio
import json
import os
import random
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from itertools import count

import httpx
import psutil
import pytest
from serving import KEYS, report, running, running_alone

from mhesa.hf.configuration import MhesaConfig
from mhesa.hf.modeling import MhesaForCausalLM
from mhesa.hf.tokenization import ByteTokenizer

AUTH = {"Authorization": f"Bearer {KEYS['alice']}"}
ENDLESS = 1 << 30


def schemathesis(server, examples, phases, folder):
    command = [
        shutil.which("schemathesis", path=os.path.dirname(sys.executable) + ":" + os.environ["PATH"]),
        *("run", f"{server.url}/openapi.json", "--header", f"Authorization: {AUTH['Authorization']}"),
        *("--mode", "all", "--max-examples", str(examples), "--seed", "1", "--no-color"),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance"),
        *("--checks", "response_schema_conformance,unsupported_method"),
        *("--phases", phases, "--request-timeout", "20"),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)


def summary(output):
    """The line in which schemathesis counts what it did."""
    lines = [line.strip(" =") for line in output.splitlines()]
    return next((line for line in reversed(lines) if "generated" in line or "passed" in line), lines[-1])


@pytest.mark.parametrize(
    ("examples", "phases"),
    [(5, "fuzzing"), pytest.param(100, "examples,coverage,fuzzing,stateful", marks=pytest.mark.torture)],
)
def test_requests_made_up_from_the_schema_find_no_fault(folder, tmp_path, examples, phases):
    pytest.importorskip("schemathesis")
    with running(folder, tmp_path / "log", limits={"max_tokens": 64}) as server:
        done = schemathesis(server, examples, phases, tmp_path)
        if examples > 10:
            report("schemathesis, all phases, valid and invalid", summary(done.stdout))
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
        assert server.client().get("/health").status_code == 200
    found = {event["event"] for event in server.events()} - {"refused"}
    assert found == {"listening", "request", "stopping", "stopped"}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of 1.2 million parameters."""
    folder = tmp_path_factory.mktemp("model") / "large"
    model = MhesaForCausalLM(MhesaConfig(hidden_size=128, num_hidden_layers=4, heads=8, dim_mhesa=256))
    model.to_logits.weight.data.normal_()
    model.to_logits.weight.data[256] = 0
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


async def stream(http, body):
    """A stream's text and how it ended."""
    text, end = "", "cut"
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                end = "done"
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                text += event["choices"][0]["text"] if "choices" in event else ""
                end = event.get("error", {}).get("code", end)
    return text, end


def client(server):
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, headers=AUTH, timeout=300, limits=limits, trust_env=False)


# In a process of its own, so that it measures the server and not the load beside it.
WATCH = """
import http.client, sys, time
while True:
    started = time.perf_counter()
    connection = http.client.HTTPConnection(sys.argv[1], timeout=60)
    connection.request("GET", "/health")
    assert connection.getresponse().read()
    connection.close()
    print(time.perf_counter() - started, flush=True)
    time.sleep(0.02)
"""


@contextmanager
def watched(server):
    """Ask for `/health` all the while; the seconds that each answer took."""
    command = [sys.executable, "-c", WATCH, server.url.removeprefix("http://")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    times = []
    yield times
    process.terminate()
    times += map(float, process.communicate()[0].split())
    assert times


def p99(times):
    return sorted(times)[int(0.99 * len(times))]


@pytest.mark.torture
def test_a_thousand_streams_are_each_as_if_alone(large, tmp_path):
    random.seed(0)
    bodies = [
        {
            "prompt": "".join(random.choices("abcdef ", k=random.randrange(100))),
            "max_tokens": random.randrange(50, 300),
            "temperature": 0,
        }
        for _ in range(1000)
    ]

    async def together(server):
        async with client(server) as http:
            return await asyncio.gather(*(stream(http, body) for body in bodies))

    with running(large, tmp_path / "log") as server:
        with server.client() as http:
            alone = [http.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
        process = psutil.Process(server.process.pid)
        idle, most = process.memory_info().rss, [0]
        stop = threading.Event()
        meter = threading.Thread(target=measure, args=(process, most, stop))
        meter.start()
        with watched(server) as times:
            found = asyncio.run(together(server))
        stop.set()
        meter.join()
    assert [end for _, end in found] == ["done"] * 1000
    assert [text for text, _ in found] == alone
    report(
        "1,000 streams at once, each compared with its text alone",
        f"{sum(text == one for (text, _), one in zip(found, alone, strict=True)):,} equal; memory "
        f"{(most[0] - idle) / 1e6:.0f} MB above idle; `/health` p99 {p99(times):.3f} s",
    )
    assert most[0] - idle <= 150e6
    assert p99(times) < 1


def measure(process, most, stop):
    while not stop.is_set():
        most[0] = max(most[0], process.memory_info().rss)
        time.sleep(0.02)


@pytest.mark.torture
def test_ten_thousand_idle_sessions(large, tmp_path):
    with (
        running_alone(large, tmp_path / "log", "--sessions", tmp_path / "s.sqlite") as (url, process),
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):

        def create(index):
            body = {"prompt": f"session {index}", "max_tokens": 1, "session": f"s{index}"}
            return http.post("/v1/completions", json=body).status_code

        before = psutil.Process(process.pid).memory_info().rss
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(create, range(10_000))) == {200}
        memory = psutil.Process(process.pid).memory_info().rss
        times = []
        for index in random.Random(0).sample(range(10_000), 500):
            started = time.perf_counter()
            body = {"prompt": "", "max_tokens": 1, "session": f"s{index}"}
            assert http.post("/v1/completions", json=body).status_code == 200
            times.append(time.perf_counter() - started)
    report(
        "10,000 idle sessions, 500 of them resumed",
        f"the whole process {memory / 1e6:.0f} MB, {(memory - before) / 1e6:.0f} MB more than without them; "
        f"a resumed one's answer after {1000 * statistics.median(times):.1f} ms (p50), "
        f"{1000 * p99(times):.1f} ms (p99)",
    )
    assert memory <= 500e6
    assert p99(times) < 0.02


@pytest.mark.torture
def test_a_thousand_disconnects_leave_neighbours_alone(large, tmp_path):
    limits = {"max_tokens": ENDLESS}
    neighbour = {"prompt": "neighbour", "temperature": 0, "max_tokens": 20_000}

    async def load(server):
        async with client(server) as http:
            beside = [asyncio.create_task(stream(http, neighbour)) for _ in range(4)]
            gate = asyncio.Semaphore(40)

            async def leave(index):
                # In the queue, while the prompt is read, while the text is written.
                prompt = "x" * random.choice([1, 100, 100_000])
                body = {"prompt": prompt, "max_tokens": ENDLESS, "stream": index % 2 == 0, "temperature": 0}
                async with gate:
                    with suppress(TimeoutError, asyncio.TimeoutError):
                        await asyncio.wait_for(
                            http.post("/v1/completions", json=body), random.choice([0.001, 0.02, 0.2])
                        )

            await asyncio.gather(*(leave(index) for index in range(1000)))
            return await asyncio.gather(*beside)

    with running(large, tmp_path / "log", limits=limits, slots=16) as server:
        with server.client() as http:
            alone = http.post("/v1/completions", json=neighbour).json()["choices"][0]["text"]
        found = asyncio.run(load(server))
        server.wait_for("mhesa_texts_waiting", 0)
        server.wait_for("mhesa_texts_active", 0)
        assert found == [(alone, "done")] * 4
        times = [freed_after(server, stream=index % 2 == 0) for index in range(50)]
    report(
        "1,000 disconnects, in the queue, in prompts, in texts, streamed and not",
        "4 neighbours' texts unchanged, all slots free; then 50 times: free after "
        f"{statistics.median(times):.3f} s (p50), {max(times):.3f} s (most)",
    )
    assert max(times) < 0.25


def freed_after(server, stream):
    """Seconds from a disconnect until the slot is free."""
    body = json.dumps({"prompt": "x", "max_tokens": ENDLESS, "temperature": 0, "stream": stream}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {AUTH['Authorization']}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_for("mhesa_texts_active", 1)
    started = time.perf_counter()
    server.wait_for("mhesa_texts_active", 0)
    return time.perf_counter() - started


@pytest.mark.torture
def test_five_hundred_slow_senders_are_closed_and_delay_nobody(folder, tmp_path):
    with running(folder, tmp_path / "log") as server:
        host, port = server.url.removeprefix("http://").split(":")
        sockets = [socket.create_connection((host, int(port))) for _ in range(500)]
        closed, started, times = set(), time.monotonic(), []
        request = iter(b"GET /" + b"a" * 100)
        while len(closed) < 500 and time.monotonic() - started < 13:
            byte = bytes([next(request)])
            for index, connection in enumerate(sockets):
                if index not in closed:
                    try:
                        connection.send(byte)
                        connection.setblocking(False)
                        if connection.recv(1) == b"":
                            closed.add(index)
                    except BlockingIOError:
                        pass
                    except OSError:
                        closed.add(index)
            with server.client() as http:
                begun = time.perf_counter()
                assert http.get("/health").status_code == 200
                times.append(time.perf_counter() - begun)
            time.sleep(0.8)
        seconds = time.monotonic() - started
        for connection in sockets:
            connection.close()
    report(
        "500 connections that send a byte a second",
        f"{len(closed)} closed after {seconds:.1f} s; `/health` at most {max(times):.3f} s meanwhile",
    )
    assert seconds < 10
    assert len(closed) == 500
    assert max(times) < 1


@pytest.mark.torture
def test_sigterm_under_a_hundred_streams(large, tmp_path):
    async def load(server):
        async with client(server) as http:
            body = {"prompt": "x", "temperature": 0}
            streams = [
                asyncio.create_task(stream(http, body | {"max_tokens": 500 if index % 2 else ENDLESS}))
                for index in range(100)
            ]
            await asyncio.to_thread(server.wait_for, "mhesa_texts_active", 100)
            server.process.terminate()
            return await asyncio.gather(*streams)

    with running(large, tmp_path / "log", limits={"max_tokens": ENDLESS}) as server:
        started = time.monotonic()
        ends = [end for _, end in asyncio.run(load(server))]
        server.process.join(30)
        assert server.process.exitcode == 0
        seconds = time.monotonic() - started
    report(
        "SIGTERM under 100 streams, half of them endless",
        f"{ends.count('done')} came whole, {ends.count('shutting_down')} were told; "
        f"exit 0 after {seconds:.1f} s",
    )
    assert ends == ["shutting_down", "done"] * 50
    assert seconds < 30


# Seconds of mixed load.
MIXED_SECONDS = float(os.environ.get("TORTURE_SECONDS", "1800"))
PROMPTS = ["", "7 bottles", "né 日本", "a" * 700, "def main(", "once upon a time " * 30]
# Wrong in ways that cost much to look at.
HOSTILE = [
    ("/v1/completions", b'{"prompt":[' + b"{}," * 349_000 + b"{}]}"),
    ("/v1/chat/completions", b'{"messages":[' + b"1," * 500_000 + b"1]}"),
    ("/v1/completions", b'{"prompt":' + b"[" * 1_000_000),
]


class MixedLoad:
    """Clients of all kinds at once, until `seconds` are over; every answer is compared with its solo run."""

    def __init__(self, server, database, seconds):
        self.server, self.database, self.seconds = server, database, seconds
        self.random = random.Random(0)
        self.counts = Counter()
        self.bodies = [
            ("/v1/completions", {"prompt": prompt, "max_tokens": tokens, "seed": 3, "temperature": heat})
            for prompt in PROMPTS
            for tokens, heat in ((1, 0), (60, 0), (150, 1))
        ]
        self.bodies += [("/v1/score", {"input": "line\n" * size, "by": "line"}) for size in (1, 500, 5000)]
        # The prompts of a session one after another, and what is written after each.
        self.turns = [f"turn {number} " for number in range(25)]
        # The sessions that are kept, and how many turns of each were acknowledged.
        self.kept = {}

    async def alone(self):
        """Note what each request is answered without others beside it."""
        async with client(self.server) as http:
            self.expected = [
                self.content((await http.post(path, json=body)).json()) for path, body in self.bodies
            ]
            self.chain = [self.content((await self.turn(http, "solo", text)).json()) for text in self.turns]

    @staticmethod
    def content(answer):
        return answer["data"] if "data" in answer else [choice["text"] for choice in answer["choices"]]

    @staticmethod
    async def turn(http, name, text):
        body = {"prompt": text, "session": name, "max_tokens": 12, "temperature": 0}
        return await http.post("/v1/completions", json=body)

    async def run(self):
        self.until = time.monotonic() + self.seconds
        kinds = [self.compare] * 6 + [self.leave] * 3 + [self.read_slowly] * 2 + [self.attack]
        async with client(self.server) as http:
            loads = [self.repeat(kind, http) for kind in kinds]
            loads += [self.converse(http, number) for number in range(4)]
            await asyncio.gather(*loads, self.make_trouble())

    async def repeat(self, kind, http):
        while time.monotonic() < self.until:
            await kind(http)

    async def compare(self, http):
        """A request, whole or streamed, in company."""
        index = self.random.randrange(len(self.bodies))
        path, body = self.bodies[index]
        if path == "/v1/completions" and self.random.random() < 0.5:
            found, end = await stream(http, body)
            assert end == "done"
            found = [found]
        else:
            answer = await http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            found = self.content(answer.json())
        assert found == self.expected[index], body
        self.counts["answers"] += 1

    async def leave(self, http):
        """A client that goes away in the middle."""
        body = {"prompt": "x" * self.random.choice([1, 5000]), "max_tokens": 4000, "stream": True}
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(
                http.post("/v1/completions", json=body), self.random.choice([0.01, 0.1, 0.5])
            )
        self.counts["disconnects"] += 1

    async def read_slowly(self, http):
        """A client that asks for much and reads nothing of it."""
        body = json.dumps({"prompt": "x", "max_tokens": 4000, "stream": True, "logprobs": 20}).encode()
        host, port = self.server.url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port), limit=1024)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {AUTH['Authorization']}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await asyncio.sleep(self.random.choice([0.5, 5]))
        writer.transport.abort()
        self.counts["slow readers"] += 1

    async def attack(self, http):
        path, body = self.random.choice(HOSTILE)
        answer = await http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        self.counts["hostile requests"] += 1
        await asyncio.sleep(1)

    async def converse(self, http, number):
        """Sessions that go on turn by turn: what was acknowledged must be there at the next."""
        for life in count():
            name = f"client{number}-{life}"
            for index, text in enumerate(self.turns):
                self.kept[name] = index
                while (answer := await self.turn(http, name, text)).status_code == 503:
                    assert answer.headers["retry-after"]
                    self.counts["503"] += 1
                    await asyncio.sleep(0.1)
                assert answer.status_code == 200, answer.text
                assert self.content(answer.json()) == self.chain[index], (name, index)
                self.kept[name] = index + 1
                self.counts["acknowledged writes"] += 1
                if time.monotonic() > self.until:
                    return

    async def make_trouble(self):
        """Lock the database, and let no file grow, time and again."""
        process = psutil.Process(self.server.process.pid)
        no_limit = process.rlimit(psutil.RLIMIT_FSIZE)
        while time.monotonic() < self.until:
            await asyncio.sleep(2)
            other = sqlite3.connect(self.database, isolation_level=None)
            with closing(other), suppress(sqlite3.OperationalError):
                other.execute("BEGIN EXCLUSIVE")
                self.counts["locks"] += 1
                await asyncio.sleep(1.5)
            await asyncio.sleep(2)
            process.rlimit(psutil.RLIMIT_FSIZE, (4096, no_limit[1]))
            await asyncio.sleep(1.5)
            process.rlimit(psutil.RLIMIT_FSIZE, no_limit)
            self.counts["full disks"] += 1

    async def check_kept(self):
        """Every acknowledged turn is in its session, which goes on from there."""
        async with client(self.server) as http:
            for name, turns in self.kept.items():
                if turns < len(self.turns):
                    answer = await self.turn(http, name, self.turns[turns])
                    assert self.content(answer.json()) == self.chain[turns], name
                else:
                    assert (await http.get(f"/v1/sessions/{name}")).status_code == 200


@pytest.mark.torture
@pytest.mark.timeout(MIXED_SECONDS + 300)
def test_mixed_load_with_trouble_loses_and_mixes_nothing(folder, tmp_path):
    database = tmp_path / "s.sqlite"
    settings = {"sessions": database, "limits": {"send_seconds": 2.0}, "slots": 64}
    with running(folder, tmp_path / "log", **settings) as server:
        load = MixedLoad(server, database, MIXED_SECONDS)
        asyncio.run(load.alone())
        process = psutil.Process(server.process.pid)
        idle, files = process.memory_info().rss, process.num_fds()
        with watched(server) as times:
            asyncio.run(load.run())
        server.wait_for("mhesa_texts_active", 0)
        server.wait_for("mhesa_texts_waiting", 0)
        until = time.monotonic() + 60
        while time.monotonic() < until and (
            process.memory_info().rss > idle + 60e6 or process.num_fds() > files
        ):
            time.sleep(0.5)
        memory = process.memory_info().rss - idle
        assert process.num_fds() <= files
    # Another process finds all that was acknowledged.
    with running(folder, tmp_path / "log2", **settings) as server:
        load.server = server
        asyncio.run(load.check_kept())
    report(
        f"{MIXED_SECONDS:.0f} s of mixed load with a locked and a full database in between",
        ", ".join(f"{number:,} {what}" for what, number in load.counts.items())
        + "; every answer that of its solo run, no acknowledged write lost, file descriptors back; memory "
        f"{memory / 1e6:.0f} MB above idle afterwards; `/health` p99 {p99(times):.3f} s, at most "
        f"{max(times):.3f} s",
    )
    assert memory <= 60e6
    assert load.counts["503"]
