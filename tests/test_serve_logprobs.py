"""Log-probabilities of completions against `Session.score`: lm-evaluation-harness' requests, streams."""

import json
import math

import numpy as np
import pytest
import torch
from serving import WORDS

from mhesa import Session


def complete(http, **body):
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def scored(reader, ids):
    """Log-probabilities of tokens by `Session`, `None` for an end of text that begins them."""
    begins = ids[0] == reader.tokenizer.eos_token_id
    bits = Session(reader).score_ids(torch.tensor(ids[begins:], dtype=torch.int64))
    return [None] * begins + (-math.log(2) * bits).tolist()


def close(found, expected):
    """Whether two lists of log-probabilities are the same."""
    return [value is None for value in found] == [value is None for value in expected] and np.allclose(
        [value or 0 for value in found], [value or 0 for value in expected], rtol=0, atol=1e-4
    )


def test_log_likelihoods_of_a_harness_are_the_sessions(served):
    http, reader = served
    encode, end = reader.tokenizer.encode_bytes, reader.tokenizer.eos_token_id
    text = WORDS.encode() * 3
    requests = []
    for index in range(60):
        context = text[index : 2 * index] if index % 6 else b""
        whole = encode(context + text[2 * index : 2 * index + 9]).tolist()
        before = encode(context).tolist()
        requests.append((before, whole[len(before) :]) if before else ([end], whole))
    for first in range(0, 60, 16):
        batch = requests[first : first + 16]
        answer = complete(
            http,
            model="tiny",
            prompt=[before + after for before, after in batch],
            temperature=0,
            max_tokens=1,
            logprobs=1,
            seed=1234,
            echo=True,
            # Half of the texts end with their first token.
            logit_bias={str(end): 100} if first % 32 else {},
        )
        usage = answer["usage"]
        assert usage["prompt_tokens"] == sum(len(before) + len(after) for before, after in batch)
        assert usage["completion_tokens"] == len(batch)
        for (before, after), choice in zip(batch, answer["choices"], strict=True):
            kept = choice["logprobs"]
            assert {len(values) for values in kept.values()} == {len(before) + len(after) + 1}
            assert close(kept["token_logprobs"][:-1], scored(reader, before + after))
            session = Session(reader)
            session.feed_ids(torch.tensor(before[before[0] == end :], dtype=torch.int64))
            expected = -math.log(2) * session.score_ids(torch.tensor(after, dtype=torch.int64)).sum()
            assert math.isclose(sum(kept["token_logprobs"][len(before) : -1]), expected, abs_tol=1e-4)
            assert (kept["top_logprobs"][0] is None) == (before[0] == end)


def test_an_end_of_text_that_is_drawn_has_an_entry_and_counts(served):
    http, reader = served
    end = reader.tokenizer.eos_token_id
    body = {"prompt": [100, 101, 102], "max_tokens": 5, "temperature": 0, "logprobs": 1}
    for echo in (True, False):
        answer = complete(http, **body, echo=echo, logit_bias={str(end): 100})
        kept = answer["choices"][0]["logprobs"]
        expected = scored(reader, [100, 101, 102, end])[0 if echo else 3 :]
        assert close(kept["token_logprobs"], expected)
        assert kept["tokens"][-1] == "<|endoftext|>"
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_ends_of_text_in_a_prompt_are_kept(served):
    http, reader = served
    end = reader.tokenizer.eos_token_id
    for ids in ([end], [end, 100], [end, end, 100], [100, end]):
        for stream in (False, True):
            answer = http.post(
                "/v1/completions",
                json={"prompt": ids, "max_tokens": 0, "logprobs": 0, "echo": True, "stream": stream},
            )
            events = [json.loads(part.removeprefix("data: ")) for part in answer.text.split("\n\n")[:1]]
            [choice] = events[0]["choices"]
            assert len(choice["logprobs"]["tokens"]) == len(ids)
            assert choice["text"] == reader.tokenizer.decode_bytes(ids).decode("utf-8", "replace")
            assert close(choice["logprobs"]["token_logprobs"], scored(reader, ids))


STOPS = pytest.mark.parametrize("stop", [None, "cut"])


@STOPS
@pytest.mark.parametrize("echo", [True, False])
def test_streams_carry_the_log_probabilities_of_all_tokens(served, echo, stop):
    http, reader = served
    prompt = reader.tokenizer.encode_bytes("né".encode()[:-1]).tolist()
    body = {"prompt": prompt, "max_tokens": 60, "logprobs": 2, "seed": 3, "n": 2, "echo": echo}
    if stop:
        # Of two bytes, in the middle of the first text.
        text = complete(http, **body)["choices"][0]["text"]
        body["stop"] = next(text[at : at + 2] for at in range(20, 60) if text[at : at + 2].isascii())
    whole = complete(http, **body)
    answer = http.post("/v1/completions", json=body | {"stream": True})
    events = [json.loads(part.removeprefix("data: ")) for part in answer.text.split("\n\n")[:-2]]
    drawn = 0
    for index, expected in enumerate(whole["choices"]):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        kept = {
            name: [value for part in parts for value in part["logprobs"][name]]
            for name in expected["logprobs"]
        }
        assert kept == expected["logprobs"]
        check_tokens(reader, prompt, expected, echo)
        drawn += len(kept["tokens"]) - len(prompt) * echo
    assert drawn == whole["usage"]["completion_tokens"]
    assert stop is None or any(choice["finish_reason"] == "stop" for choice in whole["choices"])


def check_tokens(reader, prompt, choice, echo):
    """Check names, values and offsets of a text's tokens, of which those with a stop string are not in it."""
    kept = choice["logprobs"]
    ids = {name_of(piece): token for token, piece in enumerate(reader.token_bytes)}
    ids["<|endoftext|>"] = reader.tokenizer.eos_token_id
    tokens = [ids[name] for name in kept["tokens"]]
    before = [] if echo else prompt
    assert close(kept["token_logprobs"], scored(reader, before + tokens)[len(before) :])
    data, offsets = b"", []
    for token in tokens:
        piece = reader.token_bytes[token]
        offsets.append(len((data + piece[:1]).decode("utf-8", "replace")) - bool(piece))
        data += piece
    assert kept["text_offset"] == offsets
    assert data.decode("utf-8", "replace").startswith(choice["text"].rstrip("\N{REPLACEMENT CHARACTER}"))
    assert choice["finish_reason"] == "stop" or data.decode("utf-8", "replace") == choice["text"]


def name_of(piece):
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def test_chat_streams_carry_them_too(served):
    http, reader = served
    body = {"messages": [{"role": "user", "content": "é"}], "max_tokens": 60, "logprobs": True, "seed": 3}
    end = reader.tokenizer.eos_token_id
    for bias in ({}, {str(end): 100}):
        whole = http.post("/v1/chat/completions", json=body | {"logit_bias": bias}).json()
        answer = http.post("/v1/chat/completions", json=body | {"logit_bias": bias, "stream": True})
        events = [json.loads(part.removeprefix("data: ")) for part in answer.text.split("\n\n")[:-2]]
        kept = [event["choices"][0]["logprobs"] for event in events]
        content = [token for part in kept if part for token in part["content"]]
        assert content == whole["choices"][0]["logprobs"]["content"]
        assert len(content) == whole["usage"]["completion_tokens"] == (1 if bias else 60)
