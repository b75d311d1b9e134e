"""What a user can mend."""


class InputError(ValueError):
    """Something given from outside cannot be used; the message names it and says what to do.

    The command line prints the message alone and exits with 2; what the system refuses, `OSError`, it
    prints and exits with 1. Any other exception is a fault of the program and keeps its traceback.
    """


class TrainingError(RuntimeError):
    """A training run that cannot go on; the message says at which step, and what to do."""
