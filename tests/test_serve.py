"""The server over real connections: OpenAI's own client, the limits, the keys, the logs."""

import base64
import json
import math
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import httpx
import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serving import KEYS, running, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mhesa.decoding import Decoder
from mhesa.errors import InputError
from mhesa.evaluation import surprisals
from mhesa.folder import load
from mhesa.serve.settings import Limits, Settings, read_keys

openai = pytest.importorskip("openai")
ENDLESS = 1 << 30
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    limits = {"tokens": ENDLESS, "receive": 1.0, "send": 1.0}
    with running(folder, log, limits=limits, slots=32, queue=32) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEYS["alice"],
        max_retries=0,
        http_client=httpx.Client(trust_env=False),
    ) as client:
        yield client


@pytest.fixture
def http(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def greedy(folder):
    """What transformers writes."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))

    def write(prompt, tokens):
        ids = torch.tensor([[256, *prompt.encode()]])
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :]
        return tokenizer.decode_bytes(out).decode("utf-8", "replace")

    return write


def complete(client, prompt="7 bottles", **settings):
    given = {"model": "tiny", "max_tokens": 40, "temperature": 0} | settings
    return client.completions.create(prompt=prompt, **given)


# Completions


def test_a_greedy_completion_is_what_transformers_writes(client, greedy):
    for prompt in ("7 bottles", "", "né 日本"):
        done = complete(client, prompt)
        assert done.choices[0].text == greedy(prompt, 40)
        assert done.choices[0].finish_reason == "length"
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt.encode()), 40)


def test_a_streamed_completion_is_the_same_text(client):
    settings = {"temperature": 1, "seed": 5, "n": 3, "max_tokens": 200}
    whole = complete(client, **settings)
    texts, finished, usage = [""] * 3, [None] * 3, None
    for event in complete(client, stream=True, stream_options={"include_usage": True}, **settings):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            finished[choice.index] = choice.finish_reason or finished[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert finished == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage
    assert len(set(texts)) == 3
    second = complete(client, temperature=1, seed=6, max_tokens=200)
    assert second.choices[0].text == texts[1]


def test_prompts_are_texts_or_ids_and_may_be_many(client):
    one, other = (complete(client, prompt).choices[0].text for prompt in ("ab", "cd"))
    forms = (["ab", "cd"], [[97, 98], [99, 100]], [[256, 97, 98], [99, 100]])
    for form in forms:
        assert [choice.text for choice in complete(client, form).choices] == [one, other]
    assert complete(client, [97, 98]).choices[0].text == one
    assert complete(client, "ab", echo=True).choices[0].text == "ab" + one


def test_a_text_ends_before_a_stop_streamed_or_not(client):
    whole = complete(client, max_tokens=200).choices[0].text
    stop = next(char for char in whole[20:] if char.isascii() and char.isprintable())
    for stream in (False, True):
        done = complete(client, max_tokens=200, stop=["never there", stop], stream=stream)
        text = "".join(event.choices[0].text for event in done) if stream else done.choices[0].text
        assert text == whole[: whole.index(stop)]
    assert complete(client, stop=stop, max_tokens=200).choices[0].finish_reason == "stop"


def test_biases_and_penalties_change_what_is_written(client):
    forced = complete(client, logit_bias={"65": 100}, max_tokens=30).choices[0].text
    assert forced == "A" * 30
    biased = {"logit_bias": {str(byte): 100 for byte in b"ABC"}, "max_tokens": 30}
    varied = complete(client, **biased, presence_penalty=2, frequency_penalty=2)
    assert set(varied.choices[0].text) == set("ABC")
    plain = complete(client, max_tokens=200).choices[0].text
    assert complete(client, max_tokens=200, frequency_penalty=2).choices[0].text != plain


def test_the_best_of_several_is_the_likeliest(client):
    settings = {"temperature": 1, "seed": 3, "max_tokens": 30}
    each = complete(client, n=6, logprobs=0, **settings).choices
    mean = {one.text: np.mean(one.logprobs.token_logprobs) for one in each}
    likeliest = sorted(mean, key=mean.get, reverse=True)
    best = complete(client, n=2, best_of=6, **settings)
    assert [one.text for one in best.choices] == likeliest[:2]
    assert [one.index for one in best.choices] == [0, 1]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == sum(len(one.logprobs.token_logprobs) for one in each)


def test_a_text_towards_an_end_is_refused_and_why(client):
    with pytest.raises(openai.BadRequestError, match="cannot write towards an end"):
        complete(client, suffix="the end")


FOREVER = {"prompt": "x", "max_tokens": ENDLESS, "temperature": 0}


def test_logprobs_are_the_models(client, folder):
    model, _ = load(folder)
    prompt = "né!"
    done = complete(client, prompt, logprobs=3, echo=True, max_tokens=5).choices[0]
    kept = done.logprobs
    ids = [256, *prompt.encode()]
    for _ in range(5):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert len(kept.token_logprobs) == len(ids) - 1
    expected = model(torch.tensor([ids]))[0, :-1].log_softmax(-1)
    rows = torch.arange(len(ids) - 1)
    assert np.allclose(kept.token_logprobs, expected[rows, ids[1:]].tolist(), atol=1e-4)
    for found, row in zip(kept.top_logprobs, expected, strict=True):
        assert np.allclose(sorted(found.values())[-3:], row.topk(3).values.flip(0).tolist(), atol=1e-4)
    assert kept.tokens[:4] == ["n", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert kept.text_offset[:4] == [0, 1, 1, 2]
    scored = complete(client, prompt, logprobs=0, echo=True, max_tokens=0).choices[0]
    assert scored.text == prompt
    assert scored.logprobs.token_logprobs == kept.token_logprobs[:4]
    assert scored.logprobs.top_logprobs is None


def test_streamed_logprobs_are_the_same(client):
    settings = {"logprobs": 2, "max_tokens": 60, "echo": True}
    whole = complete(client, **settings).choices[0].logprobs
    streamed = [event.choices[0].logprobs for event in complete(client, stream=True, **settings)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for part in streamed for value in getattr(part, name)] == getattr(whole, name)


# Chat


def test_chat_goes_through_the_template(client, greedy):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    expected = greedy("system: Be short.\nuser: Hi\nassistant: ", 30)
    settings = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 30}
    done = client.chat.completions.create(logprobs=True, top_logprobs=2, **settings)
    assert done.choices[0].message.content == expected
    content = done.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode("utf-8", "replace") == expected
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)
    events = list(client.chat.completions.create(stream=True, **settings))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events) == expected
    assert events[-1].choices[0].finish_reason == "length"


def test_what_the_template_refuses_is_the_clients_fault(client):
    for message in ({"role": "poet", "content": "x"}, {"role": "user", "content": "a<|endoftext|>b"}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", messages=[message])


def test_a_model_without_a_template_says_so(tmp_path):
    plain = save_model(tmp_path / "plain", chat=False)
    with running(plain, tmp_path / "log") as server, server.client() as http:
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "no_chat_template"


# Scores


def test_scores_are_the_models_surprisal(http, folder):
    model, _ = load(folder)
    text = "first line\nsecond né\nlast"
    decoder = Decoder(model)
    ids = torch.tensor([256, *text.encode()])
    bits = surprisals(decoder, ids[:-1], ids[1:], model.initial_state(1))
    data = http.post("/v1/score", json={"input": [text, ""], "by": "token"}).json()["data"]
    assert np.allclose([item["bits"] for item in data[0]["items"]], bits, atol=1e-4)
    assert math.isclose(data[0]["bits_per_byte"], bits.sum() / len(text.encode()), rel_tol=1e-4)
    assert data[1] == {"index": 1, "bytes": 0, "bits": 0, "bits_per_byte": None, "items": []}
    lines = http.post("/v1/score", json={"input": text}).json()["data"][0]["items"]
    assert [item["text"] for item in lines] == text.splitlines(keepends=True)
    assert math.isclose(sum(item["bits"] for item in lines), bits.sum(), rel_tol=1e-4)


# Sessions


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
        with (
            running(folder, tmp_path / "log", sessions=str(tmp_path / "s.sqlite")) as server,
            server.client() as http,
        ):
            if run == 0:
                session(http, "kept", "Hello")
                http.post("/v1/sessions/kept/fork", json={"to": "again"})
            texts.append(session(http, ["kept", "again"][run], "x"))
    assert texts[0] == texts[1]


# What cannot be


BAD = [
    ({"prompt": "x", "model": "other"}, 404, "model_not_found"),
    ({"prompt": "x", "model": "../../etc/passwd"}, 404, "model_not_found"),
    ({"prompt": "x", "model": "/etc/passwd\0"}, 404, "model_not_found"),
    ({"prompt": []}, 400, "invalid_value"),
    ({"prompt": [300]}, 400, "invalid_value"),
    ({"prompt": [-1]}, 400, "invalid_value"),
    ({"prompt": [[]], "max_tokens": -1}, 400, "invalid_value"),
    ({"prompt": [1.5]}, 400, "invalid_value"),
    ({"prompt": "\ud800"}, 400, "invalid_value"),
    ({"prompt": "x", "max_tokens": ENDLESS + 1}, 400, "limit_exceeded"),
    ({"prompt": "x", "max_tokens": 10**400}, 400, "invalid_value"),
    ({"prompt": "x", "temperature": -1}, 400, "invalid_value"),
    ({"prompt": "x", "temperature": float("nan")}, 400, "invalid_value"),
    ({"prompt": "x", "top_p": 0}, 400, "invalid_value"),
    ({"prompt": "x", "n": 0}, 400, "invalid_value"),
    ({"prompt": "x", "n": 1000}, 400, "limit_exceeded"),
    ({"prompt": ["x"] * 20, "n": 2}, 400, "limit_exceeded"),
    ({"prompt": "x", "stop": ["a"] * 17}, 400, "limit_exceeded"),
    ({"prompt": "x", "stop": ["a" * 257]}, 400, "limit_exceeded"),
    ({"prompt": "x", "stop": ""}, 400, "invalid_value"),
    ({"prompt": "x", "logprobs": 21}, 400, "limit_exceeded"),
    ({"prompt": "x", "seed": -1}, 400, "invalid_value"),
    ({"prompt": "x", "stream_options": {}}, 400, "invalid_value"),
    ({"prompt": "x", "presence_penalty": 3}, 400, "invalid_value"),
    ({"prompt": "x", "frequency_penalty": float("nan")}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {"257": 1}}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {"-1": 1}}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {"65": 101}}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {f"{token}": 1 for token in range(1025)}}, 400, "limit_exceeded"),
    ({"prompt": "x", "best_of": 2, "n": 3}, 400, "invalid_value"),
    ({"prompt": "x", "best_of": 2, "stream": True}, 400, "invalid_value"),
    ({"prompt": "x", "best_of": 129}, 400, "limit_exceeded"),
    ({"prompt": "x", "suffix": "y"}, 400, "invalid_value"),
    ({"prompt": "x", "temprature": 1}, 400, "unknown_parameter"),
    ({"prompt": "x", "\ud800\r\n": 1}, 400, "invalid_value"),
    ({"prompt": "x", "session": "../x"}, 400, "invalid_value"),
    ({"prompt": "x", "session": "x", "n": 2}, 400, "invalid_value"),
    ("text", 400, "invalid_value"),
    ([], 400, "invalid_value"),
    (None, 400, "invalid_value"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD, ids=lambda value: ascii(value)[:40])
def test_what_cannot_be_is_refused_in_openais_shape(http, body, status, code):
    answer = http.post(
        "/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "\n" not in error["message"]
    assert "/work" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": ' + b"[[" * 5000,
        b'{"n": 1' + b"0" * 5000 + b"}",
        b"\0",
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_body_that_is_no_json_is_refused(http, content):
    answer = http.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_openais_client_raises_its_own_errors(client, server):
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        complete(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        complete(client, top_p=0)
    with pytest.raises(openai.AuthenticationError):
        complete(client.with_options(api_key="wrong"))
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/models/../x", "/v1/%2e%2e/%2e%2e/etc/passwd", "/v1/sessions/%00"]
)
def test_paths_lead_nowhere_else(http, path):
    assert http.get(path).status_code in (400, 404)


def test_a_wrong_method_is_told_the_right_one(http):
    answer = http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


# Who may come in


def test_every_route_needs_a_key_but_health(server):
    with server.client() as http:
        paths = http.get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    routes += [
        ("get", path)
        for path in ("/", "/openapi.json", "//v1/models", "/nope", "/docs", "/health/", "//health")
    ]
    assert len(routes) > 15
    basic = base64.b64encode(b"alice:wrong").decode()
    for header in (None, "Bearer wrong", "Bearer", f"Basic {basic}", "Basic \xe9", "Bearer " + "x" * 5000):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as http:
            for method, path in routes:
                answer = http.request(method, path, headers={"Host": "localhost"})
                if path == "/health":
                    assert answer.status_code == 200
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.json()["error"]["code"] == "invalid_api_key"
    good = base64.b64encode(f"anyone:{KEYS['bob']}".encode()).decode()
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Basic {good}"}, trust_env=False
    ) as http:
        assert http.get("/").status_code == 200
        assert http.get("/v1/models", headers={"Host": "forged.example"}).status_code == 200


def test_without_keys_only_this_machines_names_are_answered(folder, tmp_path):
    with running(folder, tmp_path / "log", keys={}) as server, server.client(key=None) as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/v1/models", headers={"Host": "localhost:80"}).status_code == 200
        for host in ("forged.example", "127.0.0.1.forged.example", "localhost.forged.example", ""):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 403
        # A page elsewhere can send a form, but not JSON.
        answer = http.post(
            "/v1/completions", content='{"prompt": "x"}', headers={"Content-Type": "text/plain"}
        )
        assert answer.status_code == 400
        assert "sent with Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_server_that_is_open_to_the_network_without_keys_is_refused(folder):
    done = subprocess.run(
        [sys.executable, "-m", "mhesa", "serve", str(folder), "--port", "0", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "can be reached from other machines: give --keys FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_address_in_use_is_told_in_one_line(server, folder):
    port = server.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "mhesa", "serve", str(folder), "--port", port],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "Loading weights" not in line] == [
        f"Error: cannot listen on 127.0.0.1:{port}: is it in use?"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port must be 0 to 65535"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"queue": -1}, "queue must be at least 0"),
        ({"limits": Limits(tokens=0)}, "max_tokens must be at least 1"),
        ({"limits": Limits(seconds=math.nan)}, "timeout must be a positive number"),
        ({"host": "::"}, "can be reached from other machines"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Settings(name="tiny", **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# keys\nme: short\n", "line 2: must be a name, a colon and a key"),
        ("me 0123456789abcdef", "line 1: must be a name, a colon and a key"),
        ("\n", "holds no key"),
        ("me: 0123456789abcdef\nyou: 0123456789abcdef\n", "line 2: this name or key is there already"),
        (None, "cannot read keys from"),
    ],
)
def test_keys_that_cannot_be_are_refused_and_not_repeated(tmp_path, text, message):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_keys(path)
    assert "0123456789abcdef" not in str(error.value)


# Limits of connections


def raw(server, data, wait=10.0):
    """Send bytes and read until the server closes."""
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=wait) as connection:
        connection.sendall(data)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received


HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['alice']}\r\n"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server, http):
    answer = raw(server, (HEAD + f"Content-Length: {1 << 30}\r\n\r\n").encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer
    chunks = (b"x" * 65536 for _ in range(32))
    assert http.post("/v1/completions", content=chunks).status_code == 413


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
    limits = {"tokens": ENDLESS, "drain": 0.5}
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


def test_what_takes_too_long_is_ended(folder, tmp_path):
    limits = {"tokens": ENDLESS, "seconds": 0.5}
    with running(folder, tmp_path / "log", limits=limits) as server, server.client() as http:
        answer = http.post("/v1/completions", json=FOREVER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        streamed = http.post("/v1/completions", json=FOREVER | {"stream": True})
        assert streamed.status_code == 200
        last = streamed.text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        server.wait_for("mhesa_texts_active", 0)


# Signals and logs


def test_sigterm_lets_streams_finish_and_tells_the_rest(folder, tmp_path):
    limits = {"tokens": ENDLESS, "drain": 6}
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


def test_logs_are_one_line_an_event_and_tell_no_secrets(server, http):
    evil = 'EVIL\r\n\x1b[31m{"event": "forged"}'
    http.post("/v1/completions", json={"prompt": evil, "user": evil, "model": evil})
    http.post("/v1/completions", json={"prompt": "EVIL", "stop": evil, evil: 1})
    http.post("/v1/completions", json={"prompt": "EVIL", "max_tokens": 3})
    http.get("/EVIL%0d%0a%1b[31m")
    http.get("/v1/sessions/EVIL%0d%0a")
    raw(server, b"GET /EVIL\x1b HTTP/1.1\r\nHost: EVIL\x1b\r\nConnection: close\r\n\r\n")
    text = server.log.read_text("ascii")
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "EVIL" not in text
    assert not any(key in text for key in KEYS.values())
    events = server.events()
    assert not [event for event in events if event["event"] == "forged"]
    requests = [event for event in events if event["event"] == "request"]
    assert {"id", "client", "method", "route", "status", "ms"} <= set(requests[-1])


def test_metrics_are_prometheus(http):
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    for name in (
        "texts_active",
        "texts_waiting",
        "generated_tokens",
        "prompt_tokens",
        "state_bytes",
        "sessions",
    ):
        assert f"mhesa_{name}" in families
    for name in ("request_seconds", "time_to_first_token_seconds", "time_per_token_seconds"):
        assert families[f"mhesa_{name}"].type == "histogram"


def test_nothing_went_wrong_inside(server):
    assert not [event for event in server.events() if event["event"] not in ("listening", "request")]
