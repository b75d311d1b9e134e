"""Errors in the shape that OpenAI's clients know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class APIError(Exception):
    """What a client did wrong, or what the server cannot do now.

    Args:
        status: HTTP's.
        message: one sentence for a person.
        param: the parameter at fault.
        code: a word for a program.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        # ASCII alone: what a client sent may hold what no UTF-8 can.
        content = json.dumps(self.body()).encode("ascii")
        return Response(content, self.status, self.headers, media_type="application/json")


def busy(message: str) -> APIError:
    """Too much at once."""
    return APIError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})


def stopping() -> APIError:
    """The server is going away."""
    return APIError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})


def invalid(errors: Sequence[Any]) -> APIError:
    """The first thing that validation found, in a sentence.

    >>> invalid([{"loc": ("body", "n"), "msg": "Input should be at least 1", "type": "x"}]).message
    'n: Input should be at least 1'
    """
    first = errors[0]
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return APIError(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return APIError(
            400,
            f"unrecognized request argument: {where[-1][:64]!r}",
            param=where[-1][:64],
            code="unknown_parameter",
        )
    if first["type"] == "model_attributes_type" and not where:
        return APIError(
            400,
            "the body must be a JSON object, sent with Content-Type: application/json",
            code="invalid_value",
        )
    # Which of several forms was meant is not told, only what is wrong with it.
    names = [part for part in where if part.isidentifier() and part.islower()] or where[:1]
    name = ".".join(names[:1])
    told = first["msg"].removeprefix("Value error, ")
    message = f"{name}: {told}" if name else told
    return APIError(400, message[:500], param=name or None, code="invalid_value")
