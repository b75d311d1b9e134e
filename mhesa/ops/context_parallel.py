"""Sequences that lie over several processes: what the processes exchange to get the results of one process.

Each process of a group holds one stretch of every sequence, in the order of the processes. A stretch turns
the state before it into `product * state + end`: the product of its decays, and its final state from zero.
All processes gather these pairs and apply those of the stretches before their own, which gives the state
that their own stretch begins with. The gradient of a stretch's final state is found in the same way in the
other direction, with `dy` in the place of `x`.

The smoothing itself is an ordinary scan, between a function that receives its initial state and one that
receives the gradient of its final state. `end` takes a scan of the last rows only, as far back as the decays
leave anything of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mhesa.errors import InputError
from mhesa.ops.backends import Inputs, Scan
from mhesa.ops.checks import count_sequences
from mhesa.ops.registration import apply

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Rows that are scanned at once for a stretch's end; after each block the decays may have died out.
BLOCK = 4096


@dataclass(frozen=True)
class ContextParallel:
    """The processes that a sequence lies over, and which sequences of this process go on in its neighbours.

    Each process holds a stretch of every row of a batch, of any length. Without packing that is enough:
    each row is one sequence from the first process to the last.

    With `cu_seqlens`, which are the offsets of this process's own rows, a stretch is a run of packed
    sequences. Its first sequence may continue one of the process before, its last one may go on in the
    process behind.

    Args:
        group: the processes in the order of their stretches, such as `mesh.get_group("context")` of
            `torch.distributed.device_mesh.init_device_mesh`.
        first, last: the indices of each stretch's first and last sequence, `(stretches,)`; with `cu_seqlens`.
        continues: whether its first sequence began in the process before, `(stretches,)` of bool; with
            `cu_seqlens`. Not read in the first process.
    """

    group: ProcessGroup
    first: Tensor | None = None
    last: Tensor | None = None
    continues: Tensor | None = None

    @property
    def size(self) -> int:
        """How many processes hold a stretch."""
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The index of this process among them."""
        return dist.get_rank(self.group)

    def check(self, *, packed: bool, reverse: bool) -> None:
        """Raise `InputError` unless this fits packed or unpacked sequences in that direction."""
        given = [value is not None for value in (self.first, self.last, self.continues)]
        if packed and not all(given):
            raise InputError("with cu_seqlens, context_parallel needs first, last and continues")
        if not packed and any(given):
            raise InputError("without cu_seqlens, context_parallel takes no first, last and continues")
        if packed and reverse:
            raise InputError("packed sequences over several processes cannot run in reverse")

    def stretches(self, sequences: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """`first`, `last` and `continues`, `(stretches,)` each; unpacked, every sequence is a stretch."""
        if self.first is None or self.last is None or self.continues is None:
            rows = torch.arange(sequences, device=device)
            return rows, rows, torch.full_like(rows, self.rank > 0, dtype=torch.bool)
        return self.first, self.last, self.continues & (self.rank > 0)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process; any shape, the same in all."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def from_last(self, tensor: Tensor) -> Tensor:
        """The last process's tensor, in every process; any shape, the same in all."""
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(tensor, group=self.group, group_src=self.size - 1)
        return tensor


def stretch(length: int, processes: int, rank: int) -> slice:
    """The stretch of a sequence that a process takes: all are equally long, or differ by one.

    >>> [stretch(10, 3, rank) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    return slice(length * rank // processes, length * (rank + 1) // processes)


def scan_stretches(parallel: ContextParallel, scan: Scan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """`(y, final_state)` of this process's stretches, as one process would find them for whole sequences.

    Arguments and results of the scan are shaped as those of `mhesa.ops.exponential_smoothing`.
    """
    parallel.check(packed=inputs.cu_seqlens is not None, reverse=inputs.reverse)
    inputs = inputs._replace(initial_state=_receive_state(parallel, scan, inputs))
    others = (inputs.decay, inputs.cu_seqlens, inputs.reverse, scan, parallel)
    results: tuple[Tensor, Tensor] = apply(_ReceiveGradient, *scan(*inputs), *others)
    return results


def _receive_state(parallel: ContextParallel, scan: Scan, inputs: Inputs) -> Tensor:
    """The states, `(sequences, heads, head_dim)`, that this process's stretches begin with.

    Sequences that begin in this process begin with their initial state, or zero; no gradient passes from here
    to the other inputs.
    """
    initial_state = inputs.initial_state
    if initial_state is not None:
        initial_state = zero_continued(parallel, initial_state, reverse=inputs.reverse)
    with torch.no_grad():
        received = _state_from_others(parallel, scan, inputs._replace(initial_state=initial_state))
    return received if initial_state is None else initial_state + received


def zero_continued(parallel: ContextParallel, initial_state: Tensor, *, reverse: bool = False) -> Tensor:
    """`initial_state`, `(sequences, ...)`, with zeros for the sequences that began in other processes."""
    sequences, device = len(initial_state), initial_state.device
    if reverse:
        arrives = torch.full((sequences,), parallel.rank < parallel.size - 1, device=device)
    else:
        first, _, continues = parallel.stretches(sequences, device)
        arrives = torch.zeros(sequences, dtype=torch.bool, device=device).index_copy(0, first, continues)
    return torch.where(arrives.view(-1, *[1] * (initial_state.ndim - 1)), 0.0, initial_state)


class _ReceiveGradient(Function):
    """A scan's results; backward adds the other processes' share to the gradient of `final_state`."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        final_state: Tensor,
        decay: Tensor,
        cu_seqlens: Tensor | None,
        reverse: bool,
        scan: Scan,
        parallel: ContextParallel,
    ) -> tuple[Tensor, Tensor]:
        """Keep what the backward pass needs."""
        ctx.save_for_backward(decay, cu_seqlens)
        ctx.reverse, ctx.scan, ctx.parallel = reverse, scan, parallel
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        """Scan `dy` from the end: `p[t] = decay[t] * (dy[t] + p[t + 1])`, where `dfinal` is the last `p`."""
        decay, cu_seqlens = ctx.saved_tensors
        inputs = Inputs(dy, decay, decay, None, dfinal, cu_seqlens, not ctx.reverse)
        received = _state_from_others(ctx.parallel, ctx.scan, inputs)
        return dy, dfinal + received, None, None, None, None, None


def _state_from_others(parallel: ContextParallel, scan: Scan, inputs: Inputs) -> Tensor:
    """What each sequence gets from the other processes' stretches before it, `(sequences, heads, head_dim)`.

    Zero for sequences that begin here, which get the initial state.
    """
    x, alpha, decay, _, start, cu_seqlens, reverse = inputs
    sequences = count_sequences(x, cu_seqlens)
    if start is None:
        start = alpha.new_zeros(sequences, *x.shape[2:])
    first, last, continues = parallel.stretches(sequences, x.device)
    leaving, entering = (first, last) if reverse else (last, first)
    if cu_seqlens is None:
        product, end = _transition(scan, x, alpha, decay, start, reverse)
    else:
        offsets = cu_seqlens.tolist()
        pairs = []
        for sequence in leaving.tolist():
            rows = slice(offsets[sequence], offsets[sequence + 1])
            rates = _rows(alpha, rows), _rows(decay, rows)
            pairs.append(_transition(scan, x[:, rows], *rates, start[sequence, None], reverse))
        product, end = (torch.cat(values) for values in zip(*pairs, strict=True))
    through = (first == last) & continues
    message = torch.cat([end, torch.where(through[:, None], product, 0.0)[..., None]], dim=-1)
    if reverse:
        message = torch.where(continues[:, None, None], message, 0.0)
    gathered = parallel.gather(message.to(start.dtype))
    before = gathered[: parallel.rank : -1] if reverse else gathered[: parallel.rank]
    state = torch.zeros_like(start[entering])
    for theirs in before:
        state = theirs[..., -1:] * state + theirs[..., :-1]
    if not reverse:
        state = torch.where(continues[:, None, None], state, 0.0)
    return torch.zeros_like(start).index_copy(0, entering, state)


def _transition(
    scan: Scan, x: Tensor, alpha: Tensor, decay: Tensor, start: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """What whole sequences do to a state: `(batch, heads)` and `(batch, heads, head_dim)` in fp64.

    The product of all decays, and the final state from `start`. Rows are scanned block by block from the end,
    until the decays behind a block make what comes before it less than the smallest normal number.
    """
    product = torch.ones(x.shape[0], x.shape[2], dtype=torch.float64, device=x.device)
    end = torch.zeros_like(start, dtype=torch.float64)
    smallest = torch.finfo(start.dtype).tiny
    for rows in _blocks(x.shape[1], from_start=reverse):
        decays = _rows(decay, rows)
        _, final = scan(x[:, rows], _rows(alpha, rows), decays, None, None, None, reverse)
        end += product[..., None] * final
        wide = decays.double()
        product = product * (wide ** (rows.stop - rows.start) if wide.ndim == 1 else wide.prod(1))
        if (product.abs() < smallest).all():
            return torch.zeros_like(product), end
    return product, end + product[..., None] * start


def _blocks(length: int, *, from_start: bool) -> Iterator[slice]:
    """All rows in blocks, the first one of `length` at the start or at the end."""
    for begin in range(0, length, BLOCK):
        end = min(begin + BLOCK, length)
        yield slice(begin, end) if from_start else slice(length - end, length - begin)


def _rows(rate: Tensor, rows: slice) -> Tensor:
    """The rates of some rows; fixed rates `(heads,)` are those of all."""
    return rate if rate.ndim == 1 else rate[:, rows]


# The convolution


def receive_values(parallel: ContextParallel, values: Tensor, lengths: Tensor) -> Tensor:
    """The last values of the rows before each sequence that began in another process; zero for the others.

    Args:
        parallel: where stretches and sequences are.
        values: the last `tail` values of each sequence, oldest first, `(sequences, tail, dim)`; of one that
            is shorter and began in another process, zeros in front of those that it has.
        lengths: rows of each sequence, `(sequences,)`.
    """
    first, last, continues = parallel.stretches(len(values), values.device)
    tail = values.shape[1]
    # How many of a stretch's last values are its own; behind shorter ones are those of the stretch before.
    own = torch.where((first == last) & continues, lengths[last].clamp(max=tail), tail)
    received = apply(_ReceiveValues, values[last], own, continues, parallel)
    return torch.zeros_like(values).index_copy(0, first, received)


class _ReceiveValues(Function):
    """`(values, own, continues, parallel) ->` the values before each stretch, `(stretches, tail, dim)`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, own: Tensor, continues: Tensor, parallel: ContextParallel
    ) -> Tensor:
        """Put the values of the stretches before in a row, and keep the last."""
        ctx.save_for_backward(own, continues)
        ctx.parallel = parallel
        before = torch.zeros_like(values)
        for theirs, count in _gather_values(parallel, values, own)[: parallel.rank]:
            before = torch.where(_is_own(before, count), theirs, _shift(before, count))
        return torch.where(continues[:, None, None], before, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Take each value's gradient from the process behind."""
        own, continues = ctx.saved_tensors
        gradient = torch.where(continues[:, None, None], gradient, 0.0)
        behind = torch.zeros_like(gradient)
        for theirs, count in _gather_values(ctx.parallel, gradient, own)[: ctx.parallel.rank : -1]:
            behind = theirs + _shift(torch.where(_is_own(behind, count), 0.0, behind), -count)
        return torch.where(_is_own(behind, own), behind, 0.0), None, None, None


def _gather_values(parallel: ContextParallel, values: Tensor, own: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every process's `values`, `(stretches, tail, dim)`, and `own`, `(stretches,)`, in one message."""
    message = torch.cat([values.flatten(1), own[:, None].to(values.dtype)], dim=1)
    return [(got[:, :-1].view_as(values), got[:, -1].long()) for got in parallel.gather(message)]


def _is_own(values: Tensor, own: Tensor) -> Tensor:
    """Which of the last values are a stretch's own, `(stretches, tail, 1)`."""
    tail = values.shape[1]
    return (torch.arange(tail, device=values.device) >= tail - own[:, None])[..., None]


def _shift(values: Tensor, by: Tensor) -> Tensor:
    """`values`, `(stretches, tail, dim)`, moved forward by `(stretches,)` places; zeros fill the rest."""
    source = torch.arange(values.shape[1], device=values.device) + by[:, None]
    inside = (source >= 0) & (source < values.shape[1])
    found = values.gather(1, source.clamp(0, values.shape[1] - 1)[..., None].expand_as(values))
    return torch.where(inside[..., None], found, 0.0)
