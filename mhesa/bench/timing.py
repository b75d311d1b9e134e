"""Timing things against each other on a machine that is never quiet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleave(
    things: Mapping[str, Callable[[], object]],
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
    device: str = "cpu",
    enough: float = 2.0,
) -> dict[str, float]:
    """Median seconds of each thing, run in turn `rounds` times after one turn that does not count.

    Whatever slows the machine for a while then slows all of them alike: their ratios hold where their
    times do not.

    Args:
        things: what to time, by name.
        rounds: turns that count.
        on_round: called after every turn.
        device: a torch device; anything but `cpu` is waited for.
        enough: seconds after which a thing sits out the remaining turns.

    >>> times = interleave({"less": lambda: sum(range(10)), "more": lambda: sum(range(100_000))}, rounds=3)
    >>> times["less"] < times["more"]
    True
    """
    for thing in things.values():
        _time(thing, device)
    on_round()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, thing in things.items():
            if sum(seconds[name]) < enough:
                seconds[name].append(_time(thing, device))
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
