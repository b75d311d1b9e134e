"""How answers look: OpenAI's completions and chat, whole or in pieces."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mhesa.serve.api.service import Run, Service
from mhesa.serve.engine.jobs import Job
from mhesa.serve.engine.text import Choice, Reader, Scored


class Prompt:
    """A prompt's tokens, behind one that goes before: what a text begins with, or a session's last."""

    def __init__(self, before: int, ids: np.ndarray) -> None:
        self.ids = ids
        self.all = np.concatenate([np.array([before], dtype=ids.dtype), ids])


class Form:
    """How an answer looks, and what is the same in all of its parts.

    Args:
        service: whose answer it is.
        n: how many texts to give for each prompt, the likeliest if more were written.
        top: how many of the likeliest tokens to tell beside each; `None` tells no log-probabilities.
        echo: give the prompt back before the text.
    """

    prefix, kind, chunk = "cmpl", "text_completion", "text_completion"
    run: Run
    prompts: Sequence[Prompt]

    def __init__(self, service: Service, n: int, top: int | None, echo: bool) -> None:
        self.service, self.n, self.top, self.echo = service, n, top, echo
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    def head(self, streamed: bool) -> dict[str, Any]:
        """What every part of the answer begins with."""
        kind = self.chunk if streamed else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.settings.name}

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and of texts, so far."""
        read = sum(len(prompt.ids) for prompt in self.prompts)
        written = sum(choice.count for job in self.run.jobs for choice in job.choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        choices = []
        for index, (job, choice) in enumerate(self.owners()):
            text, scores = Reader(choice).read()
            choices.append(self.choice(index, job, text, scores, choice.finish))
        return {**self.head(False), "choices": choices, "usage": self.usage()}

    def owners(self) -> list[tuple[Job, Choice]]:
        """Every text to give and the job that it belongs to."""
        return [(job, choice) for job in self.run.jobs for choice in self._best(job)]

    def _best(self, job: Job) -> list[Choice]:
        if len(job.choices) == self.n:
            return job.choices
        return sorted(job.choices, key=lambda choice: choice.likelihood, reverse=True)[: self.n]

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Events before a text."""
        return []

    def choice(
        self, index: int, job: Job, text: str, scores: list[Scored], finish: str | None
    ) -> dict[str, Any]:
        """A whole text."""
        raise NotImplementedError

    def pieces(
        self, index: int, job: Job, text: str, scores: list[Scored], finish: str | None
    ) -> list[dict[str, Any]]:
        """Events of a piece of a text."""
        raise NotImplementedError

    def bytes(self, token: int) -> bytes:
        """What a token stands for."""
        return self.service.vocabulary.pieces[token]

    def name(self, token: int) -> str:
        """A token as text, which not every token is."""
        if token == self.service.vocabulary.end:
            return str(self.service.tokenizer.eos_token)
        try:
            return self.bytes(token).decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes(token))


class Completions(Form):
    """OpenAI's `text_completion`."""

    def __init__(self, service: Service, n: int, top: int | None, echo: bool) -> None:
        super().__init__(service, n, top, echo)
        # Where each text is by now, in characters.
        self.offsets: dict[int, int] = {}

    def choice(
        self, index: int, job: Job, text: str, scores: list[Scored], finish: str | None
    ) -> dict[str, Any]:
        """A whole text, or a piece of one."""
        if self.echo and index not in self.offsets:
            prompt = self.prompts[self.run.jobs.index(job)]
            echoed = self.service.tokenizer.decode_bytes(prompt.ids)
            text = echoed.decode("utf-8", "replace") + text
            scores = (_prompt_scores(job) if job.score else []) + scores
        logprobs = None if self.top is None else self._logprobs(index, scores, self.top)
        self.offsets.setdefault(index, 0)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def pieces(
        self, index: int, job: Job, text: str, scores: list[Scored], finish: str | None
    ) -> list[dict[str, Any]]:
        """Events of a piece of a text."""
        return [{**self.head(True), "choices": [self.choice(index, job, text, scores, finish)]}]

    def _logprobs(self, index: int, scores: list[Scored], top: int) -> dict[str, Any]:
        offsets, at = [], self.offsets.get(index, 0)
        for scored in scores:
            piece = self.bytes(scored.token)
            # A byte that goes on with a character belongs to the one that has begun.
            offsets.append(at - bool(at and piece and piece[0] & 0xC0 == 0x80))
            at += sum(byte & 0xC0 != 0x80 for byte in piece)
        self.offsets[index] = at
        likeliest = [
            {self.name(token): value for token, value in [*scored.top, (scored.token, scored.logprob)]}
            for scored in scores
        ]
        return {
            "tokens": [self.name(scored.token) for scored in scores],
            "token_logprobs": [scored.logprob for scored in scores],
            "top_logprobs": likeliest if top else None,
            "text_offset": offsets,
        }


class Chat(Form):
    """OpenAI's `chat.completion`."""

    prefix, kind, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(
        self, index: int, job: Job, text: str, scores: list[Scored], finish: str | None
    ) -> dict[str, Any]:
        """A whole text, or a piece of one."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(scores),
            "finish_reason": finish,
        }

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Whose turn it is."""
        return [self._event(index, {"role": "assistant", "content": ""}, None, None)]

    def pieces(
        self, index: int, job: Job, text: str, scores: list[Scored], finish: str | None
    ) -> list[dict[str, Any]]:
        """Events of a piece of a text."""
        events = []
        if text:
            events.append(self._event(index, {"content": text}, self._logprobs(scores), None))
        if finish:
            events.append(self._event(index, {}, None, finish))
        return events

    def _event(
        self, index: int, delta: dict[str, str], logprobs: dict[str, Any] | None, finish: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head(True), "choices": [choice]}

    def _logprobs(self, scores: list[Scored]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        content = [
            {
                **self._token(scored.token, scored.logprob),
                "top_logprobs": [self._token(token, value) for token, value in scored.top],
            }
            for scored in scores
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": logprob, "bytes": list(self.bytes(token))}


def _prompt_scores(job: Job) -> list[Scored]:
    values = [value for part in job.logprobs for value in part.tolist()]
    ids = job.ids[1:].tolist()
    return [Scored(0, *row) for row in zip(ids, values, job.likeliest or [[]] * len(ids), strict=True)]
