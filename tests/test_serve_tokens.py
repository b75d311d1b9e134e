"""Text as tokens and back, as clients of vLLM and llama.cpp ask for it."""

import pytest
from serving import WORDS


def post(http, path, **body):
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("name", ["prompt", "content"])
def test_a_text_is_tokenised_and_back(served, name):
    http, reader = served
    for text in (WORDS, "", "a\0b", WORDS * 1000):
        ids = reader.tokenizer.encode_bytes(text.encode()).tolist()
        found = post(http, "/tokenize", **{name: text, "add_special_tokens": False})
        assert (found["tokens"], found["count"], found["token_strs"]) == (ids, len(ids), None)
        assert post(http, "/detokenize", tokens=ids) == {"prompt": text, "content": text}


def test_special_tokens_go_there_and_back(served):
    http, reader = served
    end, text = reader.tokenizer.eos_token_id, "a<|endoftext|>b"
    for path in ({"prompt": text}, {"content": text, "parse_special": True, "add_special": False}):
        found = post(http, "/tokenize", **path, model="tiny", return_token_strs=True)
        assert found["token_strs"] == ["a", "<|endoftext|>", "b"]
        assert found["tokens"][1] == end
        assert post(http, "/detokenize", tokens=found["tokens"])["prompt"] == text
    # As completions read it.
    plain = post(http, "/tokenize", prompt=text, parse_special=False)["tokens"]
    assert plain == reader.tokenizer.encode_bytes(text.encode()).tolist()
    usage = post(http, "/v1/completions", prompt=text, max_tokens=0)["usage"]
    assert usage["prompt_tokens"] == len(plain)


def test_a_conversation_is_tokenised_as_chat_reads_it(served):
    http, reader = served
    messages = [
        {"role": "user", "content": "<|endoftext|>\nsystem: x"},
        {"role": "assistant", "content": None},
    ]
    found = post(http, "/tokenize", messages=messages)
    expected = b"user: <|endoftext|>\nsystem: x\nassistant: \nassistant: "
    assert found["tokens"] == reader.tokenizer.encode_bytes(expected).tolist()
    usage = post(http, "/v1/chat/completions", messages=messages, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == found["count"]


def test_tokens_that_are_no_text_are_replaced(served):
    http, reader = served
    ids = reader.tokenizer.encode_bytes(b"a\xff").tolist()
    assert post(http, "/detokenize", tokens=ids)["content"] == "a\N{REPLACEMENT CHARACTER}"
    assert post(http, "/detokenize", tokens=[]) == {"prompt": "", "content": ""}


def test_the_tokenizer_is_described(served):
    http, reader = served
    found = http.get("/tokenizer_info").json()
    assert found["eos_token"] == found["bos_token"] == "<|endoftext|>"
    assert found["chat_template"] == reader.tokenizer.chat_template


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, None),
        ("/tokenize", {"prompt": "a", "content": "b"}, None),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "with_pieces": True}, "with_pieces"),
        ("/tokenize", {"messages": [{"role": "x", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": "<|endoftext|>\ufdd0"}, "prompt"),
        ("/detokenize", {"tokens": [1 << 20]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_invalid_arguments_are_refused(served, path, body, param):
    http, _ = served
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_tokens_need_a_key(server):
    with server.client(key=None) as http:
        for path in ("/tokenize", "/detokenize"):
            assert http.post(path, json={}).status_code == 401
        assert http.get("/tokenizer_info").status_code == 401
