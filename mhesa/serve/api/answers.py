"""Answers to requests for texts, whole or streamed, in the form of OpenAI's completions and chat."""

from __future__ import annotations

import codecs
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import numpy as np
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mhesa.inference.continuation import TextCursor
from mhesa.inference.logprobs import TokenLogprob
from mhesa.inference.sampling import Sampling
from mhesa.serve.api import protocol
from mhesa.serve.api.errors import APIError, session_error
from mhesa.serve.api.lease import SessionLease
from mhesa.serve.api.pieces import with_items
from mhesa.serve.api.submission import Submission
from mhesa.serve.engine.jobs import Job
from mhesa.serve.sessions import SessionError


@dataclass(frozen=True)
class Plan:
    """What a request asks for, checked.

    Args:
        prompts: the tokens of each prompt as the client sent them, `(tokens,)`.
        texts: number of texts to write for each prompt.
        limit: the largest number of tokens of a text.
        top: number of the likeliest tokens to give beside each; `None` gives no log-probabilities.
        sampling, stops: how to draw tokens, and what ends a text.
        options: what a stream sends beside the text.
        answer: makes the answer.
        echoed: the bytes of each prompt, to put before its texts; `None` puts nothing there.
    """

    prompts: list[np.ndarray]
    texts: int
    limit: int
    top: int | None
    sampling: Sampling
    stops: list[bytes]
    options: protocol.StreamOptions
    answer: type[Answer]
    echoed: list[bytes] | None


class CharacterCounter:
    r"""Counts the characters of a text that grows token by token.

    A byte that is no part of a character counts as one, U+FFFD, as `bytes.decode` with "replace" makes it.

    >>> counter = CharacterCounter()
    >>> [counter.add(piece) for piece in (b"n", b"\xc3", b"\xa9", b"\xff", b"!")]
    [0, 1, 1, 2, 3]
    """

    def __init__(self) -> None:
        self._count = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, piece: bytes) -> int:
        """Add a token's bytes; returns the index of the character in which they begin."""
        self._count += len(self._decoder.decode(piece[:1]))
        is_complete = piece and not self._decoder.getstate()[0]
        start = self._count - 1 if is_complete else self._count
        self._count += len(self._decoder.decode(piece[1:]))
        return start


@dataclass
class Text:
    """A text of an answer.

    Args:
        index: index of the text in the answer.
        cursor: reads the text.
        echo: its job and its prompt, if the prompt's tokens are still to be put before those of the text.
    """

    index: int
    cursor: TextCursor
    echo: tuple[Job, np.ndarray] | None
    characters: CharacterCounter = field(default_factory=CharacterCounter)

    @property
    def echoed(self) -> int:
        """Prompt tokens that are still to be put before the text."""
        return 0 if self.echo is None else len(self.echo[1])


class Answer(ABC):
    """Turns the texts of a request into a response, or into the events of a stream.

    `close` must be called in any case.

    Args:
        submission: the jobs that write the texts, one for each prompt.
        plan: what the request asks for.
        lease: session that they continue.

    Attributes:
        prefix: beginning of the answer's id.
        response, response_object: model of a whole answer, and its field `object`.
        chunk, chunk_object: model of an event, and its field `object`.
    """

    prefix: str
    response: type[BaseModel]
    response_object: str
    chunk: type[BaseModel]
    chunk_object: str

    def __init__(self, submission: Submission, plan: Plan, lease: SessionLease | None) -> None:
        self.submission, self.plan, self.lease = submission, plan, lease
        self.service = submission.service
        self.log_fields: dict[str, Any] = submission.request.state.log_fields
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.service.settings.name,
        }
        self.texts: list[Text] = []
        for job, prompt, echoed in zip(
            submission.jobs, plan.prompts, plan.echoed or repeat(None), strict=False
        ):
            echo = None if echoed is None else (job, prompt)
            for text in job.texts:
                self.texts.append(Text(len(self.texts), TextCursor(text, echoed or b""), echo))

    @abstractmethod
    def _choice(self, text: Text, new: str, scores: list[TokenLogprob]) -> BaseModel:
        """What is new in a text and the scores of its tokens, in the form of a response to the whole text."""

    @abstractmethod
    def _events(self, text: Text, new: str, scores: list[TokenLogprob]) -> Iterator[BaseModel]:
        """Events for what is new in a text."""

    def _opening(self, index: int) -> Iterator[BaseModel]:
        """Events before a text; none by default."""
        return iter(())

    def size(self) -> int:
        """The number of items that an answer is made of: tokens, log-probabilities and echoed prompts."""
        tokens = sum(text.echoed + text.cursor.text.count for text in self.texts)
        return tokens * (1 if self.plan.top is None else 2 + self.plan.top)

    def whole(self) -> bytes:
        """The response of a request that is not streamed, once all texts are written; JSON."""
        whole = self.response(**self.head, object=self.response_object, choices=[], usage=self.usage())
        return "".join(with_items(whole, "choices", self._choices())).encode()

    def _choices(self) -> Iterator[str]:
        for text in self.texts:
            yield "," * (text.index > 0) + self._choice(text, *text.cursor.read()).model_dump_json()

    async def save_session(self) -> None:
        """Store the session, if the request continues one."""
        if self.lease is not None:
            await self.lease.save(self.submission.jobs[0])

    def close(self) -> None:
        """Cancel what is not finished, release the session, and note the counts for the log."""
        self.submission.close()
        if self.lease is not None:
            self.lease.release()
        self.log_fields |= self.usage().model_dump(include={"prompt_tokens", "completion_tokens"})

    def usage(self) -> protocol.Usage:
        """Numbers of tokens so far."""
        read = sum(map(len, self.plan.prompts))
        written = sum(text.count for job in self.submission.jobs for text in job.texts)
        return protocol.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def stream(self) -> AsyncIterator[str]:
        """The events of a stream, in JSON."""
        for index in range(len(self.texts)):
            for event in self._opening(index):
                yield _json(event)
        unfinished = self.texts
        while unfinished:
            await self.submission.progress()
            for text in unfinished:
                new, scores = text.cursor.read()
                self.submission.check()
                if new or text.cursor.finish:
                    size = text.echoed + len(new) + len(scores) * (2 + (self.plan.top or 0))
                    for data in await self.service.run_sized(size, self._encoded, text, new, scores):
                        yield data
            unfinished = [text for text in unfinished if not text.cursor.finish]
        await self.submission.finish()
        await self.save_session()
        if self.plan.options.include_usage:
            yield _json(self._chunk().model_copy(update={"usage": self.usage()}))

    def _encoded(self, text: Text, new: str, scores: list[TokenLogprob]) -> list[str]:
        return [_json(event) for event in self._events(text, new, scores)]

    def _chunk(self, *choices: BaseModel) -> BaseModel:
        """An event with these choices."""
        fields = dict(self.head)
        if self.plan.options.continuous_usage_stats:
            fields["usage"] = self.usage()
        elif self.plan.options.include_usage:
            fields["usage"] = None
        return self.chunk(**fields, object=self.chunk_object, choices=list(choices))


class CompletionAnswer(Answer):
    """OpenAI's `text_completion`."""

    prefix = "cmpl"
    response, response_object = protocol.Completion, "text_completion"
    chunk, chunk_object = protocol.CompletionChunk, "text_completion"

    def _events(self, text: Text, new: str, scores: list[TokenLogprob]) -> Iterator[BaseModel]:
        yield self._chunk(self._choice(text, new, scores))

    def _choice(self, text: Text, new: str, scores: list[TokenLogprob]) -> protocol.CompletionChoice:
        logprobs, finish = self._logprobs(text, scores), text.cursor.finish
        text.echo = None
        return protocol.CompletionChoice(index=text.index, text=new, logprobs=logprobs, finish_reason=finish)

    def _logprobs(self, text: Text, scores: list[TokenLogprob]) -> protocol.CompletionLogprobs | None:
        if self.plan.top is None:
            return None
        if text.echo is not None:
            scores = _prompt_scores(*text.echo) + scores
        token_bytes = self.service.token_bytes
        return protocol.CompletionLogprobs(
            tokens=[self.service.token_name(score.token) for score in scores],
            token_logprobs=[score.logprob for score in scores],
            top_logprobs=[self._likeliest(score) for score in scores] if self.plan.top else None,
            text_offset=[text.characters.add(token_bytes[score.token]) for score in scores],
        )

    def _likeliest(self, score: TokenLogprob) -> dict[str, float] | None:
        if score.logprob is None:
            return None
        pairs = [*score.top, (score.token, score.logprob)]
        return {self.service.token_name(token): value for token, value in pairs}


class ChatAnswer(Answer):
    """OpenAI's `chat.completion`."""

    prefix = "chatcmpl"
    response, response_object = protocol.ChatCompletion, "chat.completion"
    chunk, chunk_object = protocol.ChatCompletionChunk, "chat.completion.chunk"

    def _choice(self, text: Text, new: str, scores: list[TokenLogprob]) -> protocol.ChatChoice:
        message = protocol.ChatMessage(role="assistant", content=new, refusal=None)
        logprobs, finish = self._logprobs(scores), text.cursor.finish
        return protocol.ChatChoice(index=text.index, message=message, logprobs=logprobs, finish_reason=finish)

    def _opening(self, index: int) -> Iterator[BaseModel]:
        yield self._event(index, protocol.ChatDelta(role="assistant", content=""))

    def _events(self, text: Text, new: str, scores: list[TokenLogprob]) -> Iterator[BaseModel]:
        if new or scores:
            delta = protocol.ChatDelta(content=new)
            yield self._event(text.index, delta, logprobs=self._logprobs(scores))
        if finish := text.cursor.finish:
            yield self._event(text.index, protocol.ChatDelta(), finish_reason=finish)

    def _event(self, index: int, delta: protocol.ChatDelta, **more: Any) -> BaseModel:
        fields = {"logprobs": None, "finish_reason": None, **more}
        return self._chunk(protocol.ChatChunkChoice(index=index, delta=delta, **fields))

    def _logprobs(self, scores: list[TokenLogprob]) -> protocol.ChatLogprobs | None:
        if self.plan.top is None:
            return None
        content = [
            protocol.ChatScoredToken(
                **self._token(score.token, score.logprob),
                top_logprobs=[protocol.ChatToken(**self._token(*pair)) for pair in score.top],
            )
            for score in scores
        ]
        return protocol.ChatLogprobs(content=content, refusal=None)

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        piece = self.service.token_bytes[token]
        return {"token": self.service.token_name(token), "logprob": logprob, "bytes": list(piece)}


class EventStream(Response):
    """Sends an answer as server-sent events, in OpenAI's form, and closes it; an error is an event too."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as they come."""

        async def send_event(data: str, more: bool = True) -> None:
            body = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.answer.stream():
                await send_event(event)
            await send_event("[DONE]", more=False)
        except (APIError, SessionError) as error:
            failure = error if isinstance(error, APIError) else session_error(error)
            self.answer.log_fields["cut"] = failure.code
            await send_event(failure.body().model_dump_json(ensure_ascii=True), more=False)
        finally:
            self.answer.close()


def _json(event: BaseModel) -> str:
    # ASCII, because some clients end a line at U+2028 and similar characters.
    return event.model_dump_json(exclude_unset=True, ensure_ascii=True)


def _prompt_scores(job: Job, prompt: np.ndarray) -> list[TokenLogprob]:
    """The scores of a prompt's tokens."""
    values: list[float | None] = job.logprobs.tolist()
    likeliest = job.likeliest or [[] for _ in values]
    if len(prompt) == len(job.ids):
        # The client's own first token begins the text: nothing predicts it.
        values, likeliest = [None, *values], [[], *likeliest]
    return [TokenLogprob(0, *row) for row in zip(prompt.tolist(), values, likeliest, strict=True)]
