"""Large answers in JSON, made piece by piece: no single call takes long or makes all of their objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import BaseModel


def with_items(model: BaseModel, name: str, items: Iterable[str]) -> Iterator[str]:
    """The JSON of a model, with items in its empty list `name`, the last list that it has.

    Args:
        model: answer that has the list, without its items.
        name: name of the field.
        items: pieces of the list's JSON.

    >>> class Line(BaseModel):
    ...     words: list[str]
    ...     length: int
    >>> "".join(with_items(Line(words=[], length=2), "words", ['"a"', ',"b"']))
    '{"words":["a","b"],"length":2}'
    """
    before, key, after = model.model_dump_json().rpartition(f'"{name}":[]')
    yield before + key[:-1]
    yield from items
    yield "]" + after
