"""Errors whose message tells the user what to do."""

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


class TrainingError(RuntimeError):
    """A training run cannot go on; the message says at which step, and what to do."""
