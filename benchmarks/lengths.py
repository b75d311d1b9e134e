"""The operator's time against the length of the sequence: a line, up to a million steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops import ELEMENTS, TOLERANCE, Case, error, inputs, prepare, with_backend
from benchmarks.timing import interleave
from mhesa.ops.cpu.memory import keep_memory

HEADS, HEAD_DIM = 8, 64
# Each eight times the one before; the first is past the caches.
LENGTHS = (1 << 14, 1 << 17, 1 << 20)


@dataclass(frozen=True)
class Row:
    """One line of the result; `over_shorter` is the time over that of the length before, if there is one."""

    length: int
    timed: str
    milliseconds: float
    nanoseconds_per_step: float
    over_shorter: float | None


def bench_lengths(
    lengths: Sequence[int] = LENGTHS,
    *,
    rounds: int = 5,
    device: str = "cpu",
    on_round: Callable[[], object] = lambda: None,
) -> Iterator[Row]:
    """Time the default backend on sequences of 512 channels in fp32, one longer than the other.

    A million steps are 2 GB; the backward pass holds four times that. The process keeps its memory from here
    on, as training does: fresh gigabytes would measure the system that hands them out. A line appears only if
    a channel of every head is within `TOLERANCE` of fp64.

    Args:
        lengths: in steps.
        rounds: how often each is timed.
        device: a torch device.
        on_round: called `2 * (rounds + 1)` times, for a progress bar.

    Yields:
        For each of forward and forward+backward a row a length.
    """
    keep_memory()
    cases = {str(length): _operands(length, device) for length in lengths}
    for timed in ELEMENTS:
        things = {}
        for name, (operands, dy) in cases.items():
            thing = prepare(with_backend(None), timed, operands, dy)
            if _right(timed, operands, dy, thing()):
                things[name] = thing
        seconds = interleave(things, rounds, on_round, device, enough=5)
        shorter = None
        for length in lengths:
            if taken := seconds.get(str(length)):
                yield Row(length, timed, 1e3 * taken, 1e9 * taken / length, shorter and taken / shorter)
            shorter = taken


def _operands(length: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Inputs and the gradient of y: a piece again and again, for random numbers take longer than all else."""
    piece = min(length, LENGTHS[0])
    x, *rest = inputs(Case((1, piece, HEADS, HEAD_DIM), torch.float32), device)
    x = x.detach().repeat(1, length // piece, 1, 1).requires_grad_()
    return [x, *rest], torch.randn_like(x[:, :piece]).repeat(1, length // piece, 1, 1)


def _right(timed: str, operands: list[Tensor], dy: Tensor, found: Sequence[Tensor]) -> bool:
    """Whether the first channel of every head is what it is in fp64; channels do not know each other."""
    x, alpha, decay, skip = (value.detach().double().requires_grad_() for value in _first(operands))
    expected = prepare(with_backend("chunked"), timed, [x, alpha, decay, skip], dy[..., :1].double())()
    pairs = zip(found, expected, strict=True)
    return all(error(mine[..., :1], right) <= TOLERANCE[torch.float32] for mine, right in pairs)


def _first(operands: list[Tensor]) -> list[Tensor]:
    x, alpha, decay, skip = operands
    return [x[..., :1], alpha, decay, skip[..., :1]]
