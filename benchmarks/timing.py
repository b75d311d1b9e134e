"""Timing things against each other on a machine that is never quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# Larger than most caches; what is written there drives everything else out.
CACHES = 1 << 27
# What takes fewer seconds than this is sampled more than once a turn.
SHORT = 0.1
SAMPLES = 5


def interleave(
    things: Mapping[str, Callable[[], object]],
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
    device: str = "cpu",
    enough: float = 1.0,
    rehearsals: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, float]:
    """Median seconds of each thing, run in turn `rounds` times after one turn that does not count.

    Whatever slows the machine for a while then slows all of them alike: their ratios hold where their
    times do not. Each finds what it finds in a long computation, whoever was before: it runs once
    uncounted, so that the allocator gives it its own memory again, unless even its fastest run took
    `enough`; then the caches are filled with other things, and its rehearsal brings the program back to them,
    but not the data.

    Args:
        things: what to time, by name.
        rounds: turns that count.
        on_round: called after every turn.
        device: a torch device; anything but `cpu` is waited for.
        enough: seconds after which a thing sits out the remaining turns.
        rehearsals: the same things on next to no data, by the same names.

    >>> times = interleave({"less": lambda: sum(range(10)), "more": lambda: sum(range(100_000))}, rounds=3)
    >>> times["less"] < times["more"]
    True
    """
    others = torch.empty(CACHES, dtype=torch.uint8, device=device)
    fastest = {name: _time(thing, device) for name, thing in things.items()}
    on_round()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, thing in things.items():
            if sum(seconds[name]) < enough:
                for _ in range(SAMPLES if fastest[name] < SHORT else 1):
                    if fastest[name] < enough:
                        thing()
                    others.fill_(0)
                    if rehearsals is not None:
                        rehearsals[name]()
                    seconds[name].append(_time(thing, device))
                    fastest[name] = min(fastest[name], seconds[name][-1])
        on_round()
    return {name: statistics.median(values) for name, values in seconds.items()}


def _time(thing: Callable[[], object], device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    thing()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
