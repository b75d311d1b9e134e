"""Completions and chat: from a request to jobs, and from their texts to answers, whole or streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import jinja2
import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mhesa.errors import InputError
from mhesa.inference.sampling import Sampling, TokenSampler
from mhesa.serve.api.errors import APIError
from mhesa.serve.api.forms import Chat, Completions, Form, Prompt
from mhesa.serve.api.protocol import ChatRequest, CompletionRequest, StreamOptions, Writing
from mhesa.serve.api.service import Claim, Gone, Run, Service, client, facts, tokens, utf8
from mhesa.serve.engine.jobs import Job
from mhesa.serve.engine.text import Choice, Reader
from mhesa.serve.sessions import SessionError

DEFAULT_TOKENS = 16


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    """Answer a request for completions."""
    limits = service.settings.limits
    check_model(service, body.model)
    prompts = [tokens(service, prompt) for prompt in _prompts(body.prompt)]
    top = body.logprobs
    limit = check_limit(
        DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens, "max_tokens", limits.tokens
    )
    check_limit(top or 0, "logprobs", limits.logprobs)
    if body.echo and top is not None:
        check_limit(sum(map(len, prompts)), "tokens of a prompt that is echoed with logprobs", limits.scored)
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n or (best_of > n and body.stream):
        raise APIError(
            400, "best_of must be n or more, and n in a stream", param="best_of", code="invalid_value"
        )
    form = Completions(service, n, top, bool(body.echo))
    return await _write(service, request, body, prompts, limit, best_of, form)


async def chat(service: Service, request: Request, body: ChatRequest) -> Response:
    """Answer a request for the next turn of a conversation."""
    limits = service.settings.limits
    check_model(service, body.model)
    prompt = _render(service, body)
    asked = body.max_completion_tokens or body.max_tokens
    limit = check_limit(asked or limits.tokens, "max_completion_tokens", limits.tokens)
    check_limit(body.top_logprobs or 0, "top_logprobs", limits.logprobs)
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(
            400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value"
        )
    top = (body.top_logprobs or 0) if body.logprobs else None
    n = body.n or 1
    return await _write(service, request, body, [prompt], limit, n, Chat(service, n, top, False))


async def _write(
    service: Service,
    request: Request,
    body: Writing,
    prompts: list[np.ndarray],
    limit: int,
    count: int,
    form: Form,
) -> Response:
    limits = service.settings.limits
    texts = len(prompts) * count
    check_limit(texts, "prompts times n", min(limits.texts, service.settings.slots))
    check_limit(sum(map(len, prompts)), "tokens of all prompts", limits.prompt)
    sampling, stops = _sampling(service, body), _stops(service, body)
    # Which of several texts is the best is told by their tokens' log-probabilities.
    top = 0 if form.top is None and count > form.n else form.top
    if body.stream_options is not None and not body.stream:
        raise APIError(
            400, "stream_options is for streams only", param="stream_options", code="invalid_value"
        )
    if body.session and texts != 1:
        raise APIError(400, "a session takes one prompt and n=1", param="session", code="invalid_value")
    claim = Claim(service, client(request), body.session) if body.session else None
    try:
        if claim is not None:
            await claim.load()
        form.prompts = [_begin(service, ids, claim) for ids in prompts]
        jobs = []
        for prompt in form.prompts:
            choices = [
                Choice(service.vocabulary, TokenSampler(sampling, _seed(body, index)), limit, stops, top)
                for index in range(count)
            ]
            for choice in choices:
                choice.sampler.observe(prompt.all.tolist() if sampling.repetition_penalty != 1 else ())
            jobs.append(
                Job(
                    prompt.all,
                    choices,
                    client=client(request) or (request.client.host if request.client else ""),
                    state=claim.stored.state if claim and claim.stored else None,
                    score=form.echo and form.top is not None,
                    top=top or 0,
                    stream=bool(body.stream),
                    keep_state=claim is not None,
                )
            )
        form.run = run = Run(service, request, jobs)
    except BaseException:
        if claim is not None:
            claim.release()
        raise
    answer = _Answer(form, claim, body.stream_options or StreamOptions(), facts(request))
    if body.stream:
        return EventStream(answer)
    try:
        await run.finish()
        await answer.save()
        return JSONResponse(form.whole())
    finally:
        answer.close()


class _Answer:
    """What a request's answer has to see to, whole or streamed."""

    def __init__(
        self, form: Form, claim: Claim | None, options: StreamOptions, facts: dict[str, Any]
    ) -> None:
        self.form, self.claim, self.options, self.facts = form, claim, options, facts

    async def save(self) -> None:
        """Store the session."""
        if self.claim is not None:
            await self.claim.save(self.form.run.jobs[0], len(self.form.prompts[0].ids))

    def close(self) -> None:
        """End what still runs, and tell the log."""
        self.form.run.close()
        if self.claim is not None:
            self.claim.release()
        usage = self.form.usage()
        self.facts.update(prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"])

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream, but for the last."""
        form = self.form
        more: dict[str, Any] = {"usage": None} if self.options.include_usage else {}
        readers = [(job, Reader(choice)) for job, choice in form.owners()]
        for index in range(len(readers)):
            for event in form.begin(index):
                yield _event(event | more)
        open_ = list(enumerate(readers))
        while open_:
            await form.run.news()
            for index, (job, reader) in open_:
                text, scores = reader.read()
                if text or reader.finish:
                    if self.options.continuous_usage_stats:
                        more = {"usage": form.usage()}
                    for event in form.pieces(index, job, text, scores, reader.finish):
                        yield _event(event | more)
            open_ = [entry for entry in open_ if not entry[1][1].finish]
        await form.run.finish()
        await self.save()
        if self.options.include_usage:
            yield _event({**form.head(True), "choices": [], "usage": form.usage()})


class EventStream(Response):
    """Server-sent events, as OpenAI sends them."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events as they come; an error becomes one too."""

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.answer.events():
                await write(event)
            await write(b"data: [DONE]\n\n", more=False)
        except Gone:
            self.answer.facts["cut"] = "disconnected"
        except (APIError, SessionError) as error:
            told = error if isinstance(error, APIError) else APIError(error.status, str(error))
            self.answer.facts["cut"] = told.code
            await write(_event(told.body()), more=False)
        finally:
            self.answer.close()


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


def check_model(service: Service, name: str | None) -> None:
    """Raise `APIError` unless `name` is the model that is served, or none."""
    if name is not None and name != service.settings.name:
        raise APIError(
            404,
            f"there is no such model here; this server has {service.settings.name}",
            param="model",
            code="model_not_found",
        )


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise APIError(400, "prompt must not be an empty list", param="prompt", code="invalid_value")
    return list(prompt)


def _begin(service: Service, ids: np.ndarray, claim: Claim | None) -> Prompt:
    end = service.vocabulary.end
    if claim is not None and claim.stored is not None:
        return Prompt(claim.stored.token, ids)
    # Token ids may begin with the token that begins every text.
    return Prompt(end, ids[1:] if len(ids) and ids[0] == end else ids)


def _render(service: Service, body: ChatRequest) -> np.ndarray:
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise APIError(
            400,
            "this model has no chat template; use /v1/completions",
            param="messages",
            code="no_chat_template",
        )
    messages = []
    for message in body.messages:
        parts = message.content
        content = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        if str(tokenizer.eos_token) in content:
            raise APIError(
                400,
                f"a message must not hold {tokenizer.eos_token}",
                param="messages",
                code="invalid_value",
            )
        messages.append({"role": message.role, "content": content})
    try:
        ids: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise APIError(
            400, f"the chat template refuses: {error}"[:500], param="messages", code="invalid_value"
        ) from error
    return tokens(service, [int(token) for token in ids])


def _sampling(service: Service, body: Writing) -> Sampling:
    given = {
        name: value
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
            *("frequency_penalty", "presence_penalty"),
        )
        if (value := getattr(body, name)) is not None
    }
    try:
        return Sampling(**given, logit_bias=_biases(service, body))
    except InputError as error:
        raise APIError(400, str(error), param=str(error).split()[0], code="invalid_value") from error


def _biases(service: Service, body: Writing) -> dict[int, float]:
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    check_limit(len(biases), "logit_bias tokens", service.settings.limits.biases)
    size = len(service.vocabulary.pieces)
    if biases and max(biases) >= size:
        raise APIError(
            400,
            f"logit_bias: token ids must be 0 to {size - 1}, not {max(biases)}",
            param="logit_bias",
            code="invalid_value",
        )
    return biases


def _seed(body: Writing, index: int) -> int | None:
    return None if body.seed is None else body.seed + index


def _stops(service: Service, body: Writing) -> list[bytes]:
    limits = service.settings.limits
    texts = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stops = [utf8(text, "stop") for text in texts]
    check_limit(len(stops), "stop strings", limits.stops)
    if not all(stops):
        raise APIError(400, "a stop string must not be empty", param="stop", code="invalid_value")
    check_limit(max(map(len, stops), default=0), "bytes of a stop string", limits.stop)
    return stops


def check_limit(value: int, what: str, most: int) -> int:
    """The value; raises `APIError` if it is above what this server allows."""
    if value > most:
        raise APIError(
            400, f"{what}: at most {most:,}, not {value:,}", param=what.split()[0], code="limit_exceeded"
        )
    return value
