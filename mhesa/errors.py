"""Errors whose message tells the user what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Message of a `FloatingPointError`.
NOT_NUMBERS = "the model's logits are not numbers; its weights may be damaged"


class InputError(ValueError):
    """An input cannot be used; the message names it and says what to do.

    The command line prints only the message and exits with code 2 (code 1 for a `TrainingError`, and for an
    `OSError` that is not about a path). Any other exception is a bug and keeps its traceback.
    """


def reason(error: Exception) -> str:
    """What went wrong, in a few words; of an `OSError` without the number and the file's name."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def os_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn an `OSError` into an `InputError`: what cannot be done, the reason, and the remedy."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what}: {reason(error)}{remedy}") from error


class TrainingError(RuntimeError):
    """A training run cannot go on; the message says at which step, and what to do."""
