"""The surprisal of texts."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from itertools import chain

import numpy as np
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mhesa.inference.scoring import share_by_line
from mhesa.serve.api import protocol
from mhesa.serve.api.errors import check_limit, invalid
from mhesa.serve.api.pieces import with_items
from mhesa.serve.api.service import SMALL, Service, prepend, queue_of
from mhesa.serve.api.submission import Submission
from mhesa.serve.engine.jobs import Job

# Tokens or lines of an answer that are made at once.
BATCH = 2048
ITEMS = TypeAdapter(list[protocol.ScoredItem])


async def score(service: Service, request: Request, body: protocol.ScoreRequest) -> Response:
    """Answer a request for scores."""
    service.check_model(body.model)
    prompts = await service.run_sized(request.state.body_bytes, _encode, service, body)
    end = service.tokenizer.eos_token_id
    jobs = [Job(prepend(end, ids), client=queue_of(request), score=True) for ids in prompts]
    submission = Submission(service, request, jobs)
    try:
        await submission.finish()
    finally:
        submission.close()
    total = sum(map(len, prompts))
    request.state.log_fields["prompt_tokens"] = total
    content = _json(service, jobs, body.by, total)
    if total < SMALL:
        return Response("".join(content), media_type="application/json")
    # Made piece by piece as the client reads it: it can be 60 times as long as the text.
    return StreamingResponse(_in_worker(service, content), media_type="application/json")


async def _in_worker(service: Service, pieces: Iterator[str]) -> AsyncIterator[str]:
    while (piece := await service.run_sized(SMALL, next, pieces, None)) is not None:
        yield piece


def _encode(service: Service, body: protocol.ScoreRequest) -> list[np.ndarray]:
    limits = service.settings.limits
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise invalid("input must not be an empty list", "input")
    check_limit(len(texts), "input texts", min(limits.texts, service.settings.slots))
    most = limits.scored_tokens if body.by == "token" else limits.prompt_tokens
    prompts = [service.encode(text, "input") for text in texts]
    check_limit(sum(map(len, prompts)), "input tokens", most)
    return prompts


def _json(service: Service, jobs: list[Job], by: protocol.ScoreUnit, total: int) -> Iterator[str]:
    """The answer in JSON, in pieces."""
    usage = protocol.Usage(prompt_tokens=total, completion_tokens=0, total_tokens=total)
    whole = protocol.Score(object="score", model=service.settings.name, by=by, data=[], usage=usage)
    texts = (
        chain([","] if index else [], _scored_text(service, index, job, by)) for index, job in enumerate(jobs)
    )
    return with_items(whole, "data", chain.from_iterable(texts))


def _scored_text(service: Service, index: int, job: Job, by: str) -> Iterator[str]:
    ids = job.ids[1:]
    bits = job.logprobs / -math.log(2)
    text = service.decode(ids)
    sizes = service.token_sizes[ids]
    if by == "token":
        ends, costs = np.cumsum(sizes), bits
    elif by == "line":
        ends, costs = share_by_line(text, bits, sizes)
    else:
        ends, costs = np.full(min(1, len(ids)), len(text)), bits.sum(keepdims=True)
    cost = float(bits.sum())
    scored = protocol.ScoredText(
        index=index, bytes=len(text), bits=cost, bits_per_byte=cost / len(text) if text else None, items=[]
    )
    items = (_items(text, ends, costs, start) for start in range(0, len(ends), BATCH))
    return with_items(scored, "items", items)


def _items(text: bytes, ends: np.ndarray, costs: np.ndarray, first: int) -> str:
    """A batch of tokens or lines, from `first` on; those after the first batch follow a comma."""
    batch = slice(first, first + BATCH)
    start = int(ends[first - 1]) if first else 0
    items = []
    for end, cost in zip(ends[batch].tolist(), costs[batch].tolist(), strict=True):
        part = text[start:end]
        items.append(protocol.ScoredItem(text=part.decode("utf-8", "replace"), bytes=len(part), bits=cost))
        start = end
    return ("," if first else "") + ITEMS.dump_json(items).decode()[1:-1]
