"""The operator's time against the length of the sequence, up to a million steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops import ELEMENTS, TOLERANCE, Case, error, inputs, prepare, with_backend
from benchmarks.packages import say
from benchmarks.timing import interleave
from mhesa.ops.cpu.memory import keep_memory

HEADS, HEAD_DIM = 8, 64
# Each is eight times the one before; the first is larger than the caches.
LENGTHS = (1 << 14, 1 << 17, 1 << 20)


@dataclass(frozen=True)
class Row:
    """One line of the result; `over_shorter` is the time over that of the next shorter length, if any."""

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
    """Time the default backend on sequences of 512 channels in fp32, at several lengths in turn.

    A million steps are 2 GB, and the backward pass holds four times that. From here on the process keeps the
    memory that it frees, as training does: otherwise the time would be mostly that of the system handing out
    pages. A length is timed only if one channel of every head is within `TOLERANCE` of fp64.

    Args:
        lengths: lengths of sequences, in steps.
        rounds: number of times that each is timed.
        device: a torch device.
        on_round: called `2 * (rounds + 1)` times, for a progress bar.

    Yields:
        One row for each length, of the forward pass and then of forward+backward.
    """
    keep_memory()
    cases = {str(length): _operands(length, device) for length in lengths}
    for timed in ELEMENTS:
        things = {}
        for name, (operands, dy) in cases.items():
            thing = prepare(with_backend(None), timed, operands, dy)
            if _right(timed, operands, dy, thing()):
                things[name] = thing
            else:
                say(f"length {name}, {timed}: not timed, its result is wrong")
        seconds = interleave(things, rounds, on_round, device, enough=5)
        shorter = None
        for length in lengths:
            if taken := seconds.get(str(length)):
                yield Row(length, timed, 1e3 * taken, 1e9 * taken / length, shorter and taken / shorter)
            shorter = taken


def _operands(length: int, device: str) -> tuple[list[Tensor], Tensor]:
    """Inputs and the gradient of y; one random piece is repeated, because drawing more would take longest."""
    piece = min(length, LENGTHS[0])
    x, *rest = inputs(Case((1, piece, HEADS, HEAD_DIM), torch.float32), device)
    x = x.detach().repeat(1, length // piece, 1, 1).requires_grad_()
    return [x, *rest], torch.randn_like(x[:, :piece]).repeat(1, length // piece, 1, 1)


def _right(timed: str, operands: list[Tensor], dy: Tensor, found: Sequence[Tensor]) -> bool:
    """Whether the first channel of every head is right against fp64; channels are independent."""
    x, alpha, decay, skip = (value.detach().double().requires_grad_() for value in _first(operands))
    expected = prepare(with_backend("chunked"), timed, [x, alpha, decay, skip], dy[..., :1].double())()
    pairs = zip(found, expected, strict=True)
    return all(error(mine[..., :1], right) <= TOLERANCE[torch.float32] for mine, right in pairs)


def _first(operands: list[Tensor]) -> list[Tensor]:
    x, alpha, decay, skip = operands
    return [x[..., :1], alpha, decay, skip[..., :1]]
