"""The surprisal of texts."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from itertools import chain, islice, pairwise

import numpy as np
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from mhesa.inference.scoring import END, Batch, line_pieces
from mhesa.inference.statistics import BITS, STATISTICS
from mhesa.inference.units import TOKEN, UNITS, UnitSurprisal, read_units, token_units
from mhesa.serve.api import protocol
from mhesa.serve.api.errors import check_limit, invalid
from mhesa.serve.api.pieces import with_items
from mhesa.serve.api.service import SMALL, Service, prepend, queue_of
from mhesa.serve.api.submission import Submission
from mhesa.serve.engine.jobs import Job
from mhesa.tokenizers.stream import Block

# Items of an answer that are made at once, and tokens whose units are found at once.
BATCH = 2048
ITEMS = TypeAdapter(list[protocol.ScoredItem])
# What units have besides bits.
OF_UNITS = {name: statistic for name, statistic in STATISTICS.items() if name not in BITS}


async def score(service: Service, request: Request, body: protocol.ScoreRequest) -> Response:
    """Answer a request for scores."""
    service.check_model(body.model)
    prompts = await service.run_sized(len(request.state.body), _encode, service, body)
    end = service.tokenizer.eos_token_id
    statistics = {} if body.by in protocol.PLAIN_UNITS else OF_UNITS
    jobs = [
        Job(prepend(end, ids), client=queue_of(request), score=True, statistics=statistics) for ids in prompts
    ]
    submission = Submission(service, request, jobs)
    try:
        await submission.finish()
    finally:
        submission.close()
    total = sum(map(len, prompts))
    request.state.log_fields["prompt_tokens"] = total
    content = _json(service, _texts(body), jobs, body.by, total)
    if total < SMALL:
        return Response("".join(content), media_type="application/json")
    # Made piece by piece as the client reads it: it can be 60 times as long as the text.
    return StreamingResponse(_in_worker(service, content), media_type="application/json")


async def _in_worker(service: Service, pieces: Iterator[str]) -> AsyncIterator[str]:
    while (piece := await service.run_sized(SMALL, next, pieces, None)) is not None:
        yield piece


def _texts(body: protocol.ScoreRequest) -> list[str]:
    return [body.input] if isinstance(body.input, str) else body.input


def _encode(service: Service, body: protocol.ScoreRequest) -> list[np.ndarray]:
    limits, texts = service.settings.limits, _texts(body)
    if not texts:
        raise invalid("input must not be an empty list", "input")
    check_limit(len(texts), "input texts", min(limits.texts, service.settings.slots))
    most = limits.prompt_tokens if body.by in protocol.PLAIN_UNITS else limits.scored_tokens
    prompts = [service.encode(text, "input") for text in texts]
    check_limit(sum(map(len, prompts)), "input tokens", most)
    return prompts


def _json(
    service: Service, texts: list[str], jobs: list[Job], by: protocol.ScoreUnit, total: int
) -> Iterator[str]:
    """The answer in JSON, in pieces."""
    usage = protocol.Usage(prompt_tokens=total, completion_tokens=0, total_tokens=total)
    whole = protocol.Score(object="score", model=service.settings.name, by=by, data=[], usage=usage)
    scored = (
        chain([","] if index else [], _scored_text(service, index, text.encode(), job, by))
        for index, (text, job) in enumerate(zip(texts, jobs, strict=True))
    )
    return with_items(whole, "data", chain.from_iterable(scored))


def _scored_text(service: Service, index: int, text: bytes, job: Job, by: str) -> Iterator[str]:
    ids = job.ids[1:]
    bits = job.logprobs / -math.log(2)
    sizes = service.tokenizer.sizes_in_text(ids, text)
    cost = float(bits.sum())
    scored = protocol.ScoredText(
        index=index, bytes=len(text), bits=cost, bits_per_byte=cost / len(text) if text else None, items=[]
    )
    if by in protocol.PLAIN_UNITS:
        items = _lines(text, ids, sizes, bits) if by == "line" else _whole(text, cost)
    else:
        items = map(_item, _units(by, text, ids, sizes, {"bits": bits, **job.measured}))
    return with_items(scored, "items", _json_items(items))


def _json_items(items: Iterator[protocol.ScoredItem]) -> Iterator[str]:
    """The items in JSON, a batch at a time; every batch but the first follows a comma."""
    comma = ""
    while batch := list(islice(items, BATCH)):
        yield comma + ITEMS.dump_json(batch, exclude_none=True).decode()[1:-1]
        comma = ","


def _whole(text: bytes, cost: float) -> Iterator[protocol.ScoredItem]:
    if text:
        yield protocol.ScoredItem(text=text.decode("utf-8", "replace"), offset=0, bytes=len(text), bits=cost)


def _lines(
    text: bytes, ids: np.ndarray, sizes: np.ndarray, bits: np.ndarray
) -> Iterator[protocol.ScoredItem]:
    for piece, cost in line_pieces([Batch([Block(text, ids, sizes)], {"bits": bits}, sizes)]):
        line = piece.text.decode("utf-8", "replace")
        yield protocol.ScoredItem(text=line, offset=piece.offset, bytes=len(piece.text), bits=cost.sum())


def _item(unit: UnitSurprisal) -> protocol.ScoredItem:
    return protocol.ScoredItem(
        text=unit.text,
        offset=unit.offset,
        bytes=unit.size,
        bits=unit.surprisal,
        entropy=unit.entropy,
        rank=unit.rank,
    )


def _units(
    by: str, text: bytes, ids: np.ndarray, sizes: np.ndarray, columns: dict[str, np.ndarray]
) -> Iterator[UnitSurprisal]:
    batches = (
        Batch(
            [Block(text[start:end], ids[tokens], sizes[tokens])],
            {name: values[tokens] for name, values in columns.items()},
            sizes[tokens],
        )
        for tokens, start, end in _pieces(text, sizes)
    )
    if by == TOKEN:
        return token_units("", batches)
    return read_units("", chain(batches, [END]), UNITS[by])


def _pieces(text: bytes, sizes: np.ndarray) -> Iterator[tuple[slice, int, int]]:
    """Cut a text between characters and between tokens: the tokens of each piece, and its bytes."""
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    bytes_ = np.frombuffer(text + b"\n", dtype=np.uint8)
    between_characters = np.flatnonzero(bytes_[bounds] & 0xC0 != 0x80)
    wanted = np.searchsorted(between_characters, np.arange(0, len(sizes), BATCH), "right") - 1
    cuts = [*dict.fromkeys(between_characters[wanted].tolist()), len(sizes)]
    for first, last in pairwise(cuts):
        yield slice(first, last), int(bounds[first]), int(bounds[last])
