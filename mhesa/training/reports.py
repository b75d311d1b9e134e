"""What a run reports to, closed when the run ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def report(to: str) -> Iterator[None]:
    """Close the wandb run that training opens; the Trainer leaves it to the end of the program.

    The next run of the same program would go on in it otherwise. One that was open before is left open.
    """
    if to != "wandb":
        yield
        return
    import wandb

    before = wandb.run
    try:
        yield
    finally:
        if before is None and wandb.run is not None:
            wandb.finish()
