"""What a server refuses, and how it says so: bad requests, strangers, settings that cannot be."""

import base64
import json
import math
import shutil
import socket
from pathlib import Path

import pytest
from commands import run_command
from safetensors.torch import load_file, save_file
from serving import ENDLESS, KEYS, complete, in_process

from mhesa.errors import InputError
from mhesa.serve.settings import Limits, Settings, read_keys

openai = pytest.importorskip("openai")

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def http(folder):
    with in_process(folder, limits={"max_tokens": ENDLESS}, slots=32) as client:
        yield client


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
    ({"prompt": "x", "top_p": -0.1}, 400, "invalid_value"),
    ({"prompt": "x", "n": 0}, 400, "invalid_value"),
    ({"prompt": "x", "n": 1000}, 400, "limit_exceeded"),
    ({"prompt": ["x"] * 20, "n": 2}, 400, "limit_exceeded"),
    ({"prompt": "x", "stop": ["a"] * 17}, 400, "limit_exceeded"),
    ({"prompt": "x", "stop": ["a" * 257]}, 400, "limit_exceeded"),
    ({"prompt": "x", "stop": ["a", ""]}, 400, "invalid_value"),
    ({"prompt": "x", "logprobs": 21}, 400, "limit_exceeded"),
    ({"prompt": "x", "seed": 1 << 63}, 400, "invalid_value"),
    ({"prompt": "x", "seed": -(1 << 63) - 1}, 400, "invalid_value"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "invalid_value"),
    ({"prompt": "x", "presence_penalty": 3}, 400, "invalid_value"),
    ({"prompt": "x", "frequency_penalty": float("nan")}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {"257": 1}}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {"-1": 1}}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {"65": 101}}, 400, "invalid_value"),
    ({"prompt": "x", "logit_bias": {f"{token}": 1 for token in range(1025)}}, 400, "limit_exceeded"),
    ({"prompt": "x", "best_of": 2}, 400, "unknown_parameter"),
    ({"prompt": "x", "suffix": "y"}, 400, "unknown_parameter"),
    ({"prompt": "x", "temprature": 1}, 400, "unknown_parameter"),
    ({"prompt": "x", "temprature": None}, 400, "unknown_parameter"),
    ({"prompt": "x", "\ud800\r\n": 1}, 400, "invalid_value"),
    ({"prompt": "x", "session": "../x"}, 400, "invalid_value"),
    ({"prompt": "x", "session": "x", "n": 2}, 400, "invalid_value"),
    ("text", 400, "invalid_value"),
    ([], 400, "invalid_value"),
    (None, 400, "invalid_value"),
]


@pytest.mark.parametrize(("body", "status", "code"), BAD, ids=lambda value: ascii(value)[:40])
def test_invalid_requests_are_refused_in_openais_shape(http, body, status, code):
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
    ("body", "name"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"store": True}, "store"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "poet", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user\nassistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": None, "refusal": "no"}]}, "refusal"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "tool_calls"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_unsupported_chat_fields_are_refused_by_name(http, body, name):
    answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


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


def test_openais_client_raises_its_own_errors(http):
    client = openai.OpenAI(
        api_key=KEYS["alice"], base_url="http://localhost/v1", max_retries=0, http_client=http
    )
    with pytest.raises(openai.NotFoundError, match="there is no such model"):
        complete(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="top_p"):
        complete(client, top_p=2)
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


def test_every_route_needs_a_key_but_health(folder):
    with in_process(folder, key=None) as http:
        alice = {"Authorization": f"Bearer {KEYS['alice']}"}
        check_every_route(http, http.get("/openapi.json", headers=alice).json()["paths"])


def check_every_route(http, paths):
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    routes += [
        ("get", path)
        for path in ("/", "/openapi.json", "//v1/models", "/nope", "/docs", "/health/", "//health")
    ]
    assert len(routes) > 15
    basic = base64.b64encode(b"alice:wrong").decode()
    for header in (None, "Bearer wrong", "Bearer", f"Basic {basic}", "Basic \xe9", "Bearer " + "x" * 5000):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for method, path in routes:
            answer = http.request(method, path, headers=headers)
            if path == "/health":
                assert answer.status_code == 200
                continue
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
    good = {"Authorization": "Basic " + base64.b64encode(f"anyone:{KEYS['bob']}".encode()).decode()}
    assert http.get("/", headers=good).status_code == 200
    assert http.get("/v1/models", headers=good | {"Host": "forged.example"}).status_code == 200


def test_without_keys_only_this_machines_names_are_answered(folder):
    with in_process(folder, key=None, keys={}) as http:
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


ORIGINS = [
    (None, 200, None),
    ("http://localhost", 200, None),
    ("http://localhost:81", 403, None),
    ("https://page.example", 200, "https://page.example"),
    ("http://page.example", 403, None),
    ("https://page.example.forged", 403, None),
    ("null", 403, None),
]


@pytest.mark.parametrize("key", [KEYS["alice"], None])
def test_pages_of_other_origins_need_to_be_allowed(folder, key):
    origins = ("https://page.example", "app://notes")
    with in_process(folder, key=key, keys=KEYS if key else {}, allow_origins=origins) as http:
        for origin, status, allowed in ORIGINS:
            headers = {} if origin is None else {"Origin": origin}
            for path in ("/v1/models", "/nope"):
                answer = http.get(path, headers=headers)
                assert answer.status_code in (status, 404), (origin, path)
                assert answer.headers.get("access-control-allow-origin") == allowed
            answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)
            assert answer.status_code == status
            if status == 403:
                assert answer.json()["error"]["code"] == "origin_not_allowed"
                assert "--allow-origin" in answer.json()["error"]["message"]
        # An error can be read by the page too.
        refused = http.post("/v1/completions", content=b"{", headers={"Origin": "app://notes"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, "app://notes")


def test_a_browser_may_ask_first_without_a_key(folder):
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    with in_process(folder, key=None, allow_origins=("https://page.example",)) as http:
        answer = http.options("/v1/completions", headers=asked | {"Origin": "https://page.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert "POST" in answer.headers["access-control-allow-methods"]
        for name in ("authorization", "content-type", "x-stainless-lang"):
            assert name in answer.headers["access-control-allow-headers"]
        answer = http.options("/v1/completions", headers=asked | {"Origin": "https://forged.example"})
        assert answer.status_code == 400
        assert "access-control-allow-origin" not in answer.headers
        # The request itself needs a key.
        assert http.get("/v1/models", headers={"Origin": "https://page.example"}).status_code == 401
    with in_process(folder, key=None, keys={}, allow_origins=("*",)) as http:
        answer = http.options("/v1/completions", headers=asked | {"Origin": "https://any.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
        assert http.get("/v1/models", headers={"Origin": "null"}).status_code == 200


def test_no_page_is_allowed_unless_asked_for(http):
    headers = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert http.options("/v1/completions", headers=headers).status_code == 403
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == 403
    assert not any(name.startswith("access-control") for name in answer.headers)
    # Nor may a form be sent, which a browser does without asking.
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert answer.status_code == 400


def test_a_server_that_is_open_to_the_network_without_keys_is_refused(folder):
    done = run_command("serve", folder, "--port", 0, "--host", "0.0.0.0", text=True)
    assert done.returncode == 2
    assert "can be reached from other machines: give --keys FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_of_no_numbers_is_refused(folder, tmp_path):
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    weights = load_file(copied / "model.safetensors")
    weights["to_logits.weight"][3] = math.nan
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    done = run_command("serve", copied, "--port", 0, text=True)
    assert done.returncode == 2
    assert "the model's weights are not finite: to_logits.weight" in done.stderr


def test_an_address_in_use_is_told_in_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_command("serve", folder, "--port", port, text=True)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if "Loading weights" not in line] == [
        f"Error: cannot listen on 127.0.0.1:{port}: Address already in use"
    ]


def test_an_address_that_is_not_of_this_machine_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "keys").write_text("me: 0123456789abcdef\n")
    for host, why in (("192.0.2.1", "Cannot assign requested address"), ("no.such.invalid", "")):
        done = run_command(
            "serve", folder, "--host", host, "--keys", tmp_path / "keys", "--port", 0, text=True
        )
        assert done.returncode == 2
        assert f"Error: cannot listen on {host}:0: {why}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "port must be 0 to 65535"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"queue": -1}, "queue must be 0 or more"),
        ({"limits": Limits(max_tokens=0)}, "max_tokens must be at least 1"),
        ({"limits": Limits(request_seconds=math.nan)}, "timeout must be a positive number"),
        ({"allow_origins": ("https://example.org/",)}, "an origin is https://host"),
        ({"allow_origins": ("example.org",)}, "not example.org"),
        ({"host": "::"}, "can be reached from other machines"),
    ],
)
def test_invalid_settings_are_refused(settings, message):
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
def test_invalid_keys_are_refused_and_not_repeated(tmp_path, text, message):
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_keys(path)
    assert "0123456789abcdef" not in str(error.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": [{"content": "x"}]}, "messages[0].role: Field required"),
        ({}, "messages: Field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type: Input should be 'text'",
        ),
    ],
)
def test_a_fault_in_a_message_is_named_where_it_is(http, body, message):
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["message"], error["param"]) == (message, "messages")


def test_a_path_with_a_slash_too_many_is_not_redirected(http):
    answer = http.post("/v1/completions/", json={"prompt": "x"})
    assert (answer.status_code, "location" in answer.headers) == (404, False)
