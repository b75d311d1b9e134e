"""Reading a request's body: JSON, limits on lengths, then validation.

The size of a body in bytes is limited in `mhesa.serve.http.guard`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from mhesa.serve.api.errors import APIError, check_limit, invalid, validation_error
from mhesa.serve.api.protocol import RequestBody
from mhesa.serve.api.service import Service
from mhesa.serve.settings import Limits

Body = TypeVar("Body", bound=RequestBody)
# The largest number of members of one JSON object, unless `Limits.logit_biases` is larger.
MEMBERS = 4096
# The largest number of JSON objects in a body.
OBJECTS = 1 << 15


async def read_body(service: Service, request: Request, kind: type[Body]) -> Body:
    """The request's body, validated.

    Raises:
        APIError: it is not JSON, too long somewhere, or not what `kind` describes.
    """
    content: bytes = request.state.body
    if not _is_json(request.headers.get("content-type", "")):
        raise _not_an_object()
    return await service.run_sized(len(content), parse, content, kind, service.settings.limits)


def parse(content: bytes, kind: type[Body], limits: Limits) -> Body:
    """See `read_body`. Counts are checked before items: a list of a million wrong items costs nothing."""
    check = partial(_check_object, numbers=count(1), most=max(MEMBERS, limits.logit_biases))
    try:
        value = json.loads(content, object_hook=check)
    except (ValueError, RecursionError) as error:
        raise invalid("the body is not JSON", None, "invalid_json") from error
    if not isinstance(value, dict):
        raise _not_an_object()
    _check_counts(value, limits)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        raise validation_error([{**one, "loc": ("body", *one["loc"])} for one in errors]) from None


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _not_an_object() -> APIError:
    return invalid("the body must be a JSON object, sent with Content-Type: application/json", None)


def _check_object(members: dict[str, Any], numbers: Iterator[int], most: int) -> dict[str, Any]:
    """Check one JSON object, while the body is read: the next of `numbers` is its own."""
    if len(members) > most:
        message = f"a JSON object may have at most {most:,} members, not {len(members):,}"
        raise invalid(message, None, "limit_exceeded")
    if next(numbers) > OBJECTS:
        raise invalid(f"the body may have at most {OBJECTS:,} JSON objects", None, "limit_exceeded")
    return members


def _check_counts(value: dict[str, Any], limits: Limits) -> None:
    """Check how many items the lists and objects have that a request may hold."""
    for name, items, most in (
        ("stop", "stop strings", limits.stop_strings),
        ("logit_bias", "logit_bias tokens", limits.logit_biases),
        ("messages", "messages", limits.messages),
    ):
        if isinstance(value.get(name), (list, dict)):
            check_limit(len(value[name]), items, most)
    for name in ("prompt", "input"):
        texts = value.get(name)
        # A list of numbers is one text.
        if isinstance(texts, list) and texts and not isinstance(texts[0], int):
            check_limit(len(texts), f"{name} texts", limits.texts)
