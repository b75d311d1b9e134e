"""A small model, and servers of it: in processes of their own, or in this one."""

import gc
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import httpx
import torch
from commands import FORKED

from mhesa.model.loading import load
from mhesa.serve.api.app import create_app
from mhesa.serve.api.service import Service
from mhesa.serve.http.guard import protect
from mhesa.serve.http.server import serve
from mhesa.serve.settings import Limits, Settings

KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789ab"}
ENDLESS = 1 << 30
WORDS = "né the cat, 日本 dog; sat on 🙂 mats and the rest\nof it was not there "
FOREVER = {"prompt": "x", "max_tokens": ENDLESS, "temperature": 0}
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['alice']}\r\n"
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'developer' %}{{ raise_exception('no such role') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
)


def save_model(folder: Path, tokenizer=None, template: str | None = TEMPLATE) -> Path:
    """A model of random weights that are large enough for its predictions to be clear."""
    # Not above: every server that is forked imports this module, and transformers takes a second and a half.
    from mhesa.hf import ByteTokenizer, MhesaConfig, MhesaForCausalLM

    torch.manual_seed(0)
    tokenizer = tokenizer or ByteTokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "heads": 4}
    model = MhesaForCausalLM(MhesaConfig(**sizes, dim_mhesa=16))
    with torch.no_grad():
        model.to_logits.weight.normal_(std=2)
        # Greedy texts never end by themselves.
        model.to_logits.weight[tokenizer.eos_token_id] = 0
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Server:
    """A running server."""

    url: str
    process: BaseProcess
    log: Path
    folder: Path

    def client(self, key: str | None = KEYS["alice"], **settings) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **settings)

    def wait_for(self, name: str, value: float) -> None:
        with self.client() as client:
            wait_for(client, name, value)

    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text("ascii").splitlines()]


def wait_for(client: httpx.Client, name: str, value: float, seconds: float = 20) -> None:
    """Wait until a metric has a value."""
    until = time.monotonic() + seconds
    while True:
        lines = client.get("/metrics").text.splitlines()
        found = sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)
        if found == value:
            return
        assert time.monotonic() < until, f"{name} is {found}, not {value}"
        time.sleep(0.02)


@contextmanager
def running(folder: Path, log: Path, **settings):
    """Start a server; it must stop in order afterwards, unless it did already."""
    log.write_text("")
    settings.setdefault("keys", KEYS)
    process = FORKED.Process(target=run_server, args=(folder, settings, dict(os.environ), str(log)))
    process.start()
    try:
        url = url_of(process.is_alive, log)
        yield Server(url, process, log, folder)
        process.terminate()
        process.join(40)
        assert process.exitcode == 0
    finally:
        process.kill()
        process.join()


def run_server(folder: Path, settings: dict, environment: dict[str, str], log: str) -> None:
    """Be a server that logs to a file, with settings that the command line does not offer."""
    # What was imported before the fork need not be searched for garbage.
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    limits = Limits(**settings.pop("limits", {}))
    serve(Service(*load(folder), Settings(name="tiny", port=0, limits=limits, **settings)))


@contextmanager
def running_alone(folder: Path, log: Path, *options):
    """The address and process of `mhesa serve` without keys, in a new interpreter: it holds nothing else."""
    command = [sys.executable, "-m", "mhesa", "serve", str(folder), "--port", "0", *map(str, options)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        yield url_of(lambda: process.poll() is None, log), process
        process.terminate()
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()


@contextmanager
def in_process(folder: Path, key: str | None = KEYS["alice"], limits=None, **settings):
    """A client of a server in this process, without sockets."""
    from starlette.testclient import TestClient

    limits = Limits(**limits or {})
    service = Service(*load(folder), Settings("tiny", limits=limits, **{"keys": KEYS} | settings))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with TestClient(protect(create_app(service), service), "http://localhost", headers=headers) as client:
            yield client
    finally:
        service.close()


def url_of(runs: Callable[[], bool], log: Path) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until and runs():
        for line in log.read_text().splitlines():
            if '"listening"' in line:
                return json.loads(line)["url"]
        time.sleep(0.05)
    raise AssertionError(log.read_text())


def report(what, found):
    """Tell what was found, and add it to the report that `make torture` writes, if it does."""
    print(f"\n{what}: {found}")
    if path := os.environ.get("TORTURE_REPORT"):
        with open(path, "r+") as file:
            if "## The server" not in file.read():
                file.write("\n## The server\n\n| what happened | what was found |\n|---|---|\n")
            file.write(f"| {what} | {found} |\n")


def raw(server, data, wait=10.0):
    """Send bytes and read until the server closes."""
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


def complete(client, prompt="7 bottles", **settings):
    given = {"model": "tiny", "max_tokens": 40, "temperature": 0} | settings
    return client.completions.create(prompt=prompt, **given)


@contextmanager
def locked(path):
    """Hold SQLite's lock for writers, as another program does."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.close()
