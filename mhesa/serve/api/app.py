"""The routes."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

import mhesa
from mhesa.serve.api import protocol
from mhesa.serve.api.errors import APIError, invalid
from mhesa.serve.api.page import page
from mhesa.serve.api.service import Claim, Gone, Run, Service, client, facts, tokens
from mhesa.serve.api.writing import chat, check_limit, check_model, complete
from mhesa.serve.engine.jobs import Job
from mhesa.serve.http import metrics
from mhesa.serve.http.guard import Guard
from mhesa.serve.sessions import Listed, SessionError

STATUSES = {
    400: "What was asked for cannot be.",
    401: "No valid API key.",
    403: "A name of this server that is not localhost, where there are no API keys.",
    404: "There is no such thing.",
    409: "A session is in use, exists already or belongs to another model.",
    413: "The body is too large.",
    429: "Too much at once: come again after `Retry-After` seconds.",
    500: "A fault of the server.",
    503: "The server is shutting down, or its model failed.",
    504: "It took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody, "description": what} for status, what in STATUSES.items()
}
SessionPath = Annotated[str, Path(pattern=protocol.SESSION_NAME, description="A session's name.")]


def create_app(service: Service) -> ASGIApp:
    """The application, guarded."""
    app = FastAPI(
        title="mhesa",
        version=mhesa.__version__,
        summary="A linear-time language model behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        separate_input_output_schemas=False,
    )
    app.state.service = service
    _handle_errors(app)
    _add_pages(app, service)
    _add_writing(app, service)
    _add_sessions(app, service)
    return Guard(app, service)


def _handle_errors(app: FastAPI) -> None:
    async def told(request: Request, error: Exception) -> Response:
        return _api_error(error).response()

    for kind in (APIError, SessionError, RequestValidationError, HTTPException, Gone, Exception):
        app.add_exception_handler(kind, told)


def _api_error(error: Exception) -> APIError:
    match error:
        case APIError():
            return error
        case SessionError():
            return APIError(error.status, str(error), param="session", code="session_error")
        case RequestValidationError():
            return invalid(error.errors())
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=error.headers)
        case Gone():
            return APIError(499, "the client went away", code="disconnected")
        case _:
            return APIError(500, "something went wrong here", code="internal_error")


def _add_pages(app: FastAPI, service: Service) -> None:
    playground, reference = page("playground.html"), page("docs.html")

    @app.get("/", include_in_schema=False)
    async def show_playground() -> Response:
        return playground

    @app.get("/docs", include_in_schema=False)
    async def show_reference() -> Response:
        return reference

    @app.get("/health", response_model=protocol.Health)
    async def health() -> JSONResponse:
        """Whether requests are taken; needs no key."""
        if service.engine.failure is not None:
            return JSONResponse({"status": "failed"}, 503)
        if service.stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(await service.aside(service.metrics.text), media_type=metrics.CONTENT_TYPE)


def _add_writing(app: FastAPI, service: Service) -> None:
    stream: dict[str, Any] = {"text/event-stream": {}}

    @app.get("/v1/models", response_model=protocol.Models)
    async def models() -> JSONResponse:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{name:path}", response_model=protocol.Model)
    async def model(name: str) -> JSONResponse:
        """What is known of a model."""
        check_model(service, name)
        return JSONResponse(_model(service))

    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": protocol.Completion, "content": stream}},
    )
    async def completions(request: Request, body: protocol.CompletionRequest) -> Response:
        """Write texts that continue prompts."""
        return await complete(service, request, body)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": protocol.ChatCompletion, "content": stream}},
    )
    async def chat_completions(request: Request, body: protocol.ChatRequest) -> Response:
        """Write the next turn of a conversation, in the form that the model's chat template gives it."""
        return await chat(service, request, body)

    @app.post("/v1/score", response_model=protocol.Score)
    async def score(request: Request, body: protocol.ScoreRequest) -> JSONResponse:
        """Measure how much each token or line of a text surprises the model, in bits."""
        return await _score(service, request, body)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "mhesa",
        "parameters": service.parameters,
        "state_bytes": service.engine.slots.bytes,
    }


async def _score(service: Service, request: Request, body: protocol.ScoreRequest) -> JSONResponse:
    limits = service.settings.limits
    check_model(service, body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_limit(len(texts), "input texts", min(limits.texts, service.settings.slots))
    prompts = [tokens(service, text, "input") for text in texts]
    total = sum(map(len, prompts))
    check_limit(total, "input tokens", limits.scored if body.by == "token" else limits.prompt)
    if not texts:
        raise APIError(400, "input must not be an empty list", param="input", code="invalid_value")
    begin = [service.vocabulary.end]
    owner = client(request) or (request.client.host if request.client else "")
    jobs = [
        Job(np.concatenate([np.array(begin, ids.dtype), ids]), [], client=owner, score=True)
        for ids in prompts
    ]
    run = Run(service, request, jobs)
    try:
        await run.finish()
    finally:
        run.close()
    facts(request)["prompt_tokens"] = total
    data = [{"index": index, **_scored(service, job, body.by)} for index, job in enumerate(jobs)]
    usage = {"prompt_tokens": total, "completion_tokens": 0, "total_tokens": total}
    return JSONResponse(
        {"object": "score", "model": service.settings.name, "by": body.by, "data": data, "usage": usage}
    )


def _scored(service: Service, job: Job, by: str) -> dict[str, Any]:
    bits = np.concatenate([np.empty(0), *(part.numpy() for part in job.logprobs)]) / -math.log(2)
    pieces = [service.vocabulary.pieces[token] for token in job.ids[1:].tolist()]
    items = []
    text, start = b"", 0
    for index, piece in enumerate(pieces, 1):
        text += piece
        if by == "token" or index == len(pieces) or (by == "line" and piece.endswith(b"\n")):
            surprisal = float(bits[start:index].sum())
            items.append({"text": text.decode("utf-8", "replace"), "bytes": len(text), "bits": surprisal})
            text, start = b"", index
    size, total = sum(map(len, pieces)), float(bits.sum())
    return {"bytes": size, "bits": total, "bits_per_byte": total / size if size else None, "items": items}


def _add_sessions(app: FastAPI, service: Service) -> None:
    sessions, aside = service.sessions, service.aside

    @app.get("/v1/sessions", response_model=protocol.SessionList)
    async def list_sessions(
        request: Request,
        after: Annotated[str, Query(max_length=64, description="Begin behind this name.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    ) -> JSONResponse:
        """Your sessions, by name."""
        found = await aside(sessions.page, client(request), after, limit + 1)
        data = [_session(session) for session in found[:limit]]
        return JSONResponse({"object": "list", "data": data, "has_more": len(found) > limit})

    @app.get("/v1/sessions/{name}", response_model=protocol.SessionInfo)
    async def get_session(request: Request, name: SessionPath) -> JSONResponse:
        """What is known of a session."""
        found = await aside(sessions.get, client(request), name)
        if found is None:
            raise SessionError(404, f"there is no session {name}")
        return JSONResponse(_session(found))

    @app.post("/v1/sessions/{name}/fork", response_model=protocol.SessionInfo)
    async def fork_session(request: Request, name: SessionPath, body: protocol.ForkRequest) -> JSONResponse:
        """Copy a session under a new name."""
        await aside(sessions.fork, client(request), name, body.to)
        found = await aside(sessions.get, client(request), body.to)
        assert found is not None
        return JSONResponse(_session(found))

    @app.delete("/v1/sessions/{name}", response_model=protocol.Deleted)
    async def delete_session(request: Request, name: SessionPath) -> JSONResponse:
        """Forget a session."""
        claim = Claim(service, client(request), name)
        try:
            if not await aside(sessions.delete, client(request), name):
                raise SessionError(404, f"there is no session {name}")
        finally:
            claim.release()
        return JSONResponse({"object": "session", "name": name, "deleted": True})


def _session(listed: Listed) -> dict[str, Any]:
    return {"object": "session", **asdict(listed)}
