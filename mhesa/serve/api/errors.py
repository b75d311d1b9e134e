"""Errors in the form that OpenAI's clients know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from mhesa.serve.api.protocol import IGNORED_VALUES, ErrorBody, ErrorDetail
from mhesa.serve.sessions import SessionError

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


# How pydantic names the types of a union.
TYPE_NAMES = frozenset({"str", "int", "float", "bool"})


class APIError(Exception):
    """An answer that is an error.

    Args:
        status: the HTTP status.
        message: one sentence for people.
        param: the parameter at fault.
        code: one word for programs.
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

    def body(self) -> ErrorBody:
        """The answer's body."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else _printable(self.param)
        detail = ErrorDetail(message=_printable(self.message), type=kind, param=param, code=self.code)
        return ErrorBody(error=detail)

    def response(self) -> Response:
        """The whole answer."""
        content = self.body().model_dump_json()
        return Response(content, self.status, self.headers, media_type="application/json")


def _printable(text: str) -> str:
    """Text that UTF-8 can encode: JSON from a client may hold lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def invalid(message: str, param: str | None, code: str = "invalid_value") -> APIError:
    """The error for a value that is not allowed."""
    return APIError(400, message, param=param, code=code)


def disconnected() -> APIError:
    """The error where nobody waits for an answer any more."""
    return APIError(499, "the client closed the connection", code="disconnected")


def stopping(reason: str = "the server is shutting down") -> APIError:
    """The error while the server shuts down."""
    return APIError(503, reason, code="shutting_down", headers={"Retry-After": "5"})


def session_error(error: SessionError) -> APIError:
    """A session's error as an answer."""
    headers = {"Retry-After": "1"} if error.status == 503 else None
    code = "sessions_unavailable" if error.status == 503 else "session_error"
    return APIError(error.status, str(error), param="session", code=code, headers=headers)


def check_limit(value: int, what: str, most: int) -> None:
    """Raise `APIError` if a value is above this server's limit."""
    if value > most:
        raise invalid(f"{what}: at most {most:,}, not {value:,}", what.split()[0], "limit_exceeded")


def _places(loc: Sequence[str | int]) -> list[int]:
    """The places in lists that a fault is at."""
    return [part for part in loc if isinstance(part, int)]


def validation_error(errors: Sequence[Any]) -> APIError:
    """A fault that validation found, in a sentence.

    >>> validation_error([{"loc": ("body", "n"), "msg": "Input should be at least 1", "type": "x"}]).message
    'n: Input should be at least 1'
    """
    # Of the types of a union, the one that fits best has its fault deepest and last.
    first = max(errors, key=lambda error: (len(error["loc"]), _places(error["loc"])))
    where = [str(part) for part in first["loc"][1:]]
    if first["type"] == "extra_forbidden":
        name = where[-1][:64]
        what = "unsupported" if name in IGNORED_VALUES else "unrecognized"
        return invalid(f"{what} request argument: {name!r}", name, "unknown_parameter")
    # For a union, `where` also holds the types that were tried.
    names = [part for part in where if part.isidentifier() and part.islower() and part not in TYPE_NAMES]
    place = [
        f"[{part}]" if part.isdigit() else f".{part}" for part in where if part in names or part.isdigit()
    ]
    name, message = "".join(place).lstrip("."), first["msg"].removeprefix("Value error, ")
    return invalid((f"{name}: {message}" if name else message)[:500], names[0] if names else None)
