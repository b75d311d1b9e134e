"""The application: its routes, its errors, its description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.types import DecoratedCallable
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

import mhesa
from mhesa.serve.api import metrics, protocol
from mhesa.serve.api.body import Body, read_body
from mhesa.serve.api.completions import plan_chat, plan_completions, write
from mhesa.serve.api.errors import APIError, session_error, validation_error
from mhesa.serve.api.lease import SessionLease
from mhesa.serve.api.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ForkRequest,
    ScoreRequest,
    TokenizeRequest,
)
from mhesa.serve.api.scores import score
from mhesa.serve.api.service import Service
from mhesa.serve.api.tokens import detokenize, tokenize, tokenizer_info
from mhesa.serve.sessions import SessionError, SessionInfo
from mhesa.web_pages import policy, read_page

STATUSES = {
    400: "The request is wrong.",
    401: "There is no valid API key.",
    403: "The web page's origin is not allowed; or there are no API keys and the host is not localhost.",
    404: "There is no such thing.",
    409: "A session is in use, exists already or belongs to another model.",
    413: "The body is too large.",
    429: "Too many requests or sessions; where there is `Retry-After`, try again after so many seconds.",
    500: "A fault of the server.",
    503: "The server is shutting down, its model failed, or the file of sessions cannot be used now.",
    504: "The request took too long.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody, "description": what} for status, what in STATUSES.items()
}
SCHEMAS = "#/components/schemas/{model}"
# Tokens that the page asks for at first.
DEFAULT_TOKENS_OF_PAGE = 400
SessionPath = Annotated[str, Path(pattern=protocol.SESSION_NAME, description="A session's name.")]


def create_app(service: Service) -> FastAPI:
    """The application, without access control."""
    app = FastAPI(
        title="mhesa",
        version=mhesa.__version__,
        summary="A linear-time language model behind OpenAI's API.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
        separate_input_output_schemas=False,
        # A redirect would name this server's host and no TLS, whatever is in front of it.
        redirect_slashes=False,
    )
    # The first version that describes streams of events.
    app.openapi_version = "3.2.0"
    _handle_errors(app)
    _add_pages(app, service)
    _add_models(app, service)
    _add_generation(app, service)
    _add_tokens(app, service)
    _add_sessions(app, service)
    _describe_bodies(app)
    return app


def _handle_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        return _api_error(error).response()

    for kind in (APIError, SessionError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _api_error(error: Exception) -> APIError:
    match error:
        case APIError():
            return error
        case SessionError():
            return session_error(error)
        case RequestValidationError():
            return validation_error(error.errors())
        case HTTPException():
            return APIError(error.status_code, str(error.detail), headers=error.headers)
        case _:
            return APIError(500, "the server has a fault", code="internal_error")


def _page(name: str, **values: str) -> HTMLResponse:
    """A page of this package with these values, and a policy that allows only its own script and style."""
    text = read_page(__package__, name, **values)
    allowed = policy(text, connect="'self'") + "; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": allowed})


def _add_pages(app: FastAPI, service: Service) -> None:
    most = service.settings.limits.max_tokens
    playground = _page("playground.html", most=str(most), default=str(min(DEFAULT_TOKENS_OF_PAGE, most)))
    reference = _page("docs.html")

    @app.get("/", include_in_schema=False)
    async def show_playground() -> Response:
        return playground

    @app.get("/docs", include_in_schema=False)
    async def show_reference() -> Response:
        return reference

    @app.get("/health", responses={503: {"model": protocol.Health}})
    async def health(response: Response) -> protocol.Health:
        """Whether requests are taken; needs no key."""
        if service.engine.failure is None and not service.stopping:
            return protocol.Health(status="ok")
        response.status_code = 503
        return protocol.Health(status="stopping" if service.engine.failure is None else "failed")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def show_metrics() -> Response:
        """Figures for Prometheus."""
        text = await service.run_in_disk_thread(service.metrics.text)
        return Response(text, media_type=metrics.CONTENT_TYPE)


def _add_models(app: FastAPI, service: Service) -> None:
    served = protocol.Model(
        id=service.settings.name,
        object="model",
        created=service.created,
        owned_by="mhesa",
        parameters=service.parameters,
        state_bytes=service.engine.state_bytes,
    )

    @app.get("/v1/models")
    async def models() -> protocol.Models:
        """The model that is served."""
        return protocol.Models(object="list", data=[served])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> protocol.Model:
        """What is known of a model."""
        service.check_model(name)
        return served


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": SCHEMAS.format(model=model.__name__)}


def _events(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The description of a stream: of one event, whose data is a chunk or an error as JSON, or the end."""
    contents = [_reference(chunk), _reference(protocol.ErrorBody)]
    json = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": contents}}
    data = {"anyOf": [json, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": event}}}}


def _post(
    app: FastAPI, path: str, body: type[BaseModel], answer: type[Any], chunk: type[BaseModel] | None = None
) -> Callable[[DecoratedCallable], DecoratedCallable]:
    """Decorates a route, and describes the body that it reads and the events that it can stream."""
    content = {"application/json": {"schema": _reference(body)}}
    return app.post(
        path,
        response_model=answer,
        responses=None if chunk is None else _events(chunk),
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )


def _describe_bodies(app: FastAPI) -> None:
    """Describe the bodies of requests and the events of streams, which FastAPI does not see."""
    bodies = (CompletionRequest, ChatRequest, ScoreRequest, TokenizeRequest, DetokenizeRequest, ForkRequest)
    chunks = (protocol.CompletionChunk, protocol.ChatCompletionChunk)
    _, schemas = models_json_schema(
        [*((body, "validation") for body in bodies), *((chunk, "serialization") for chunk in chunks)],
        ref_template=SCHEMAS,
    )
    app.openapi()["components"]["schemas"] |= schemas["$defs"]


def _add_generation(app: FastAPI, service: Service) -> None:
    @_post(app, "/v1/completions", CompletionRequest, protocol.Completion, protocol.CompletionChunk)
    async def completions(request: Request) -> Response:
        """Write texts that continue prompts."""
        body = await read_body(service, request, CompletionRequest)
        return await write(service, request, body, plan_completions)

    @_post(app, "/v1/chat/completions", ChatRequest, protocol.ChatCompletion, protocol.ChatCompletionChunk)
    async def chat_completions(request: Request) -> Response:
        """Write the next turn of a conversation, in the form of the model's chat template."""
        return await write(service, request, await read_body(service, request, ChatRequest), plan_chat)

    @_post(app, "/v1/score", ScoreRequest, protocol.Score)
    async def scores(request: Request) -> Response:
        """Measure the surprisal of each token or line of a text, in bits."""
        return await score(service, request, await read_body(service, request, ScoreRequest))


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer = tokenizer_info(service)

    async def answer(
        request: Request, kind: type[Body], make: Callable[[Service, Body], BaseModel]
    ) -> Response:
        body = await read_body(service, request, kind)
        size = len(request.state.body)
        content = await service.run_sized(size, lambda: make(service, body).model_dump_json())
        return Response(content, media_type="application/json")

    @_post(app, "/tokenize", TokenizeRequest, protocol.Tokens)
    async def make_tokens(request: Request) -> Response:
        """Make tokens of a text or a conversation."""
        return await answer(request, TokenizeRequest, tokenize)

    @_post(app, "/detokenize", DetokenizeRequest, protocol.Detokenized)
    async def make_text(request: Request) -> Response:
        """Make a text of tokens."""
        return await answer(request, DetokenizeRequest, detokenize)

    @app.get("/tokenizer_info")
    async def show_tokenizer() -> protocol.TokenizerInfo:
        """What is known of the tokenizer."""
        return tokenizer


def _add_sessions(app: FastAPI, service: Service) -> None:
    sessions, run_in_disk_thread = service.sessions, service.run_in_disk_thread

    @app.get("/v1/sessions")
    async def list_sessions(
        request: Request,
        after: Annotated[str, Query(max_length=64, description="Begin after this name.")] = "",
        limit: Annotated[int, Query(ge=1, le=1000, description="How many at most.")] = 100,
    ) -> protocol.SessionList:
        """Your sessions, by name."""
        found = await run_in_disk_thread(sessions.page, request.state.client, after, limit + 1)
        return protocol.SessionList(object="list", data=found[:limit], has_more=len(found) > limit)

    @app.get("/v1/sessions/{name}")
    async def get_session(request: Request, name: SessionPath) -> SessionInfo:
        """What is known of a session."""
        found = await run_in_disk_thread(sessions.get, request.state.client, name)
        if found is None:
            raise SessionError(404, f"there is no session {name}")
        return found

    @_post(app, "/v1/sessions/{name}/fork", ForkRequest, SessionInfo)
    async def fork_session(request: Request, name: SessionPath) -> SessionInfo:
        """Copy a session under a new name."""
        body = await read_body(service, request, ForkRequest)
        # No request may be creating the copy's name.
        with SessionLease(service, request.state.client, body.to):
            return await run_in_disk_thread(sessions.fork, request.state.client, name, body.to)

    @app.delete("/v1/sessions/{name}")
    async def delete_session(request: Request, name: SessionPath) -> protocol.Deleted:
        """Delete a session."""
        with SessionLease(service, request.state.client, name):
            if not await run_in_disk_thread(sessions.delete, request.state.client, name):
                raise SessionError(404, f"there is no session {name}")
        return protocol.Deleted(object="session", name=name, deleted=True)
