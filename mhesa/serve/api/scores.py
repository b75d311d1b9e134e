"""The surprisal of texts."""

from __future__ import annotations

import math

import numpy as np
from starlette.requests import Request

from mhesa.inference.scoring import share_by_line
from mhesa.serve.api import protocol
from mhesa.serve.api.errors import check_limit, invalid
from mhesa.serve.api.service import Service, prepend, queue_of
from mhesa.serve.api.submission import Submission
from mhesa.serve.engine.jobs import Job


async def score(service: Service, request: Request, body: protocol.ScoreRequest) -> protocol.Score:
    """Answer a request for scores."""
    limits = service.settings.limits
    service.check_model(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_limit(len(texts), "input texts", min(limits.texts, service.settings.slots))
    prompts = [service.encode(text, "input") for text in texts]
    total = sum(map(len, prompts))
    check_limit(total, "input tokens", limits.scored_tokens if body.by == "token" else limits.prompt_tokens)
    if not texts:
        raise invalid("input must not be an empty list", "input")
    end = service.tokenizer.eos_token_id
    jobs = [Job(prepend(end, ids), client=queue_of(request), score=True) for ids in prompts]
    submission = Submission(service, request, jobs)
    try:
        await submission.finish()
    finally:
        submission.close()
    request.state.log_fields["prompt_tokens"] = total
    return protocol.Score(
        object="score",
        model=service.settings.name,
        by=body.by,
        data=[_scored_text(service, index, job, body.by) for index, job in enumerate(jobs)],
        usage=protocol.Usage(prompt_tokens=total, completion_tokens=0, total_tokens=total),
    )


def _scored_text(service: Service, index: int, job: Job, by: str) -> protocol.ScoredText:
    bits = np.concatenate([np.empty(0), *(part.numpy() for part in job.logprobs)]) / -math.log(2)
    pieces = [service.token_bytes[token] for token in job.ids[1:].tolist()]
    sizes = np.array([len(piece) for piece in pieces])
    if by == "token":
        parts = list(zip(pieces, bits.tolist(), strict=True))
    elif by == "line":
        parts = share_by_line(b"".join(pieces), bits, sizes)
    else:
        parts = [(b"".join(pieces), float(bits.sum()))] if pieces else []
    items = [
        protocol.ScoredItem(text=text.decode("utf-8", "replace"), bytes=len(text), bits=cost)
        for text, cost in parts
    ]
    size, total = int(sizes.sum()), float(bits.sum())
    return protocol.ScoredText(
        index=index, bytes=size, bits=total, bits_per_byte=total / size if size else None, items=items
    )
