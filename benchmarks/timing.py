"""Timing several functions against each other on a machine that other programs use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# Bytes that are written to evict everything else from the caches; larger than most caches.
CACHE_BYTES = 1 << 27
# A function that takes fewer seconds than this is timed several times in each round.
SHORT = 0.1
SAMPLES = 5


def interleave(
    things: Mapping[str, Callable[[], object]],
    rounds: int,
    on_round: Callable[[], object] = lambda: None,
    device: str = "cpu",
    enough: float = 1.0,
    warmups: Mapping[str, Callable[[], object]] | None = None,
    settle: float = 0.0,
) -> dict[str, float]:
    """Median seconds of each function, called in turn for `rounds` rounds after one that does not count.

    Whatever slows the machine down for a while slows all of them down: their ratios are steadier than their
    times. Each call is timed in the same state, whatever ran before it. The function has just run once
    untimed, so that the allocator hands it the same memory again; one that takes `enough` seconds or more
    skips this. Then the caches are overwritten, and its warm-up loads its instructions, but not its data.

    Args:
        things: functions by name.
        rounds: number of rounds that count.
        on_round: called after every round.
        device: a torch device; its work is waited for.
        enough: seconds after which a function sits out the remaining rounds.
        warmups: by the same names, the same functions on small inputs.
        settle: seconds to wait before each call that is timed. torch's threads keep their cores for 6 ms
            after torch has overwritten the caches.

    >>> seconds = interleave({"few": lambda: sum(range(10)), "many": lambda: sum(range(100))}, rounds=3)
    >>> list(seconds)
    ['few', 'many']
    """
    evicting = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    fastest = {name: _time(thing, device) for name, thing in things.items()}
    on_round()
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, thing in things.items():
            if sum(seconds[name]) < enough:
                for _ in range(SAMPLES if fastest[name] < SHORT else 1):
                    if fastest[name] < enough:
                        thing()
                    evicting.fill_(0)
                    if warmups is not None:
                        warmups[name]()
                    time.sleep(settle)
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
