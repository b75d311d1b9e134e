"""From a request for completions or chat to its jobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from typing import Any, TypeVar

import jinja2
import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from mhesa.errors import InputError
from mhesa.inference.continuation import Continuation
from mhesa.inference.sampling import Sampling, TokenSampler
from mhesa.serve.api.answers import Answer, ChatAnswer, CompletionAnswer, EventStream, Plan
from mhesa.serve.api.errors import check_limit, invalid
from mhesa.serve.api.lease import SessionLease
from mhesa.serve.api.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    StreamOptions,
)
from mhesa.serve.api.service import Service, prepend, queue_of, utf8
from mhesa.serve.api.submission import Submission
from mhesa.serve.engine.jobs import Job

Body = TypeVar("Body", bound=GenerationRequest)
DEFAULT_TOKENS = 16


def plan_completions(service: Service, body: CompletionRequest) -> Plan:
    """What a request for completions asks for."""
    limits = service.settings.limits
    service.check_model(body.model)
    prompts = [service.encode(prompt, "prompt") for prompt in _prompts(body.prompt)]
    limit = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    check_limit(limit, "max_tokens", limits.max_tokens)
    check_limit(body.logprobs or 0, "logprobs", limits.logprobs)
    return _plan(service, body, prompts, limit, body.logprobs, CompletionAnswer, bool(body.echo))


def plan_chat(service: Service, body: ChatRequest) -> Plan:
    """What a request for the next turn of a conversation asks for."""
    limits = service.settings.limits
    service.check_model(body.model)
    prompt = render(service, body.messages)
    limit = body.max_completion_tokens or body.max_tokens or limits.max_tokens
    check_limit(limit, "max_completion_tokens", limits.max_tokens)
    check_limit(body.top_logprobs or 0, "top_logprobs", limits.logprobs)
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    top = (body.top_logprobs or 0) if body.logprobs else None
    return _plan(service, body, [prompt], limit, top, ChatAnswer)


def _plan(
    service: Service,
    body: GenerationRequest,
    prompts: list[np.ndarray],
    limit: int,
    top: int | None,
    answer: type[Answer],
    echo: bool = False,
) -> Plan:
    limits, n = service.settings.limits, body.n or 1
    texts, tokens = len(prompts) * n, sum(map(len, prompts))
    check_limit(texts, "prompts times n", min(limits.texts, service.settings.slots))
    check_limit(tokens * (n if echo else 1), "tokens of all prompts", limits.prompt_tokens)
    if echo and top is not None:
        check_limit(tokens, "tokens of a prompt that is echoed with logprobs", limits.scored_tokens)
    if top is not None:
        # Those of a stream are in memory, too, where its client does not read them.
        entries = (texts * limit + (tokens * n if echo else 0)) * (top + 1)
        check_limit(entries, "logprobs in one answer", limits.logprob_entries)
    if body.stream_options and body.stream_options.model_dump(exclude_defaults=True) and not body.stream:
        raise invalid("stream_options is for streams only", "stream_options")
    if body.session and texts != 1:
        raise invalid("a session takes one prompt and n=1", "session")
    sampling, stops = _sampling(service, body), _stops(service, body)
    options = body.stream_options or StreamOptions()
    echoed = [service.decode(prompt) for prompt in prompts] if echo else None
    return Plan(prompts, n, limit, top, sampling, stops, options, answer, echoed)


async def write(
    service: Service, request: Request, body: Body, make_plan: Callable[[Service, Body], Plan]
) -> Response:
    """Answer a request for texts."""
    plan = await service.run_sized(len(request.state.body), make_plan, service, body)
    with ExitStack() as stack:
        lease = None
        if body.session:
            lease = stack.enter_context(SessionLease(service, request.state.client, body.session))
            await lease.load()
        size = len(request.state.body) * plan.texts
        jobs = await service.run_sized(size, _jobs, service, request, body, plan, lease)
        submission = Submission(service, request, jobs)
        answer = plan.answer(submission, plan, lease)
        # From now on the answer holds the session, until it is closed.
        stack.pop_all()
    if body.stream:
        return EventStream(answer)
    try:
        await submission.finish()
        await answer.save_session()
        content = await service.run_sized(answer.size(), answer.whole)
        return Response(content, media_type="application/json")
    finally:
        answer.close()


def _jobs(
    service: Service, request: Request, body: GenerationRequest, plan: Plan, lease: SessionLease | None
) -> list[Job]:
    stored = None if lease is None else lease.stored
    is_scored = plan.echoed is not None and plan.top is not None
    last, state = (None, None) if stored is None else (stored.token, stored.state)
    jobs = []
    for prompt in plan.prompts:
        ids = _with_first_token(prompt, service.tokenizer.eos_token_id, last)
        samplers = [
            TokenSampler(plan.sampling, None if body.seed is None else body.seed + index)
            for index in range(plan.texts)
        ]
        if plan.sampling.repetition_penalty != 1:
            seen = np.zeros(len(service.token_bytes), dtype=bool)
            seen[ids] = True
            for sampler in samplers:
                sampler.observe(np.flatnonzero(seen).tolist())
        texts = [
            Continuation(
                sampler,
                plan.limit,
                end=service.tokenizer.eos_token_id,
                decode=service.token_bytes.__getitem__,
                stops=plan.stops,
                top=plan.top,
            )
            for sampler in samplers
        ]
        jobs.append(
            Job(
                ids,
                texts,
                client=queue_of(request),
                state=state,
                score=is_scored,
                top=plan.top or 0,
                stream=bool(body.stream),
                keep_state=lease is not None,
            )
        )
    return jobs


def _prompts(prompt: str | list[Any]) -> list[str | list[int]]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise invalid("prompt must not be an empty list", "prompt")
    return list(prompt)


def _with_first_token(ids: np.ndarray, end: int, last: int | None) -> np.ndarray:
    """Put the session's last token before a prompt, or the end-of-text token that begins every text."""
    if last is not None:
        return prepend(last, ids)
    # A client's token ids may begin with it already.
    return ids if len(ids) and ids[0] == end else prepend(end, ids)


def render(
    service: Service, conversation: Sequence[Message], add_generation_prompt: bool = True
) -> np.ndarray:
    """The tokens of a conversation in the form of the model's chat template, `(tokens,)`.

    Raises:
        APIError: there is no template, or it refuses the conversation.
    """
    tokenizer = service.tokenizer
    if not tokenizer.chat_template:
        raise invalid("this model has no chat template; use /v1/completions", "messages", "no_chat_template")
    messages = []
    for message in conversation:
        given = {"role": message.role, "content": message.text(), "name": message.name or ""}
        for text in given.values():
            utf8(text, "messages")
        messages.append({name: text for name, text in given.items() if text or name != "name"})
    try:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise invalid(f"the chat template refuses: {error}"[:500], "messages") from error
    except InputError as error:
        raise invalid(str(error), "messages") from error
    return service.encode(ids, "messages")


def _sampling(service: Service, body: GenerationRequest) -> Sampling:
    names = {field.name for field in fields(Sampling)} - {"logit_bias"}
    biases = {int(token): bias for token, bias in (body.logit_bias or {}).items()}
    service.check_token(max(biases, default=0), "logit_bias")
    given = body.model_dump(include=names, exclude_none=True)
    if body.top_p == 0:
        given |= {"top_p": 1, "top_k": 1}
    try:
        return Sampling(**given, logit_bias=biases)
    except InputError as error:
        raise invalid(str(error), str(error).split()[0]) from error


def _stops(service: Service, body: GenerationRequest) -> list[bytes]:
    limits = service.settings.limits
    texts = [body.stop] if isinstance(body.stop, str) else body.stop or []
    stops = [utf8(text, "stop") for text in texts]
    if not all(stops):
        raise invalid("a stop string must not be empty", "stop")
    check_limit(max(map(len, stops), default=0), "bytes of a stop string", limits.stop_bytes)
    return stops
