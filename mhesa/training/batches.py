"""The micro-batches of each step, and the states that are carried from one step's windows to the next's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhesa.data.windows import Windows, pack
from mhesa.ops.context_parallel import ContextParallel, stretch
from mhesa.processes import gather
from mhesa.training.distributed import ONE_PROCESS, Grid


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward pass: some windows, or this process's stretch of each.

    Args:
        ids: `(windows, length)`, or `(1, windows * length)` where documents are packed.
        labels: the token after each, in the same shape.
        cu_seqlens: where packed sequences begin, `(sequences + 1,)`; `None` if each window is one sequence.
        first, last: indices of each window's first and last sequence, `(windows,)`.
        continues: whether its first sequence continues the stretch or window before it, `(windows,)`.
        weight: this process's tokens divided by the mean over processes. Losses times weight, averaged over
            processes, give the mean over tokens.
        context_parallel: the processes that share its windows, if several do.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    first: Tensor
    last: Tensor
    continues: Tensor
    weight: float
    context_parallel: ContextParallel | None

    @property
    def sequences(self) -> int:
        """How many sequences it holds."""
        return len(self.ids) if self.cu_seqlens is None else len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class Batches:
    """This process's share of every step's windows.

    Args:
        windows: where each step's windows begin.
        accumulate: number of micro-batches in a step.
        eos_token_id: begin a sequence at each of these tokens; with `None`, a window is one sequence.
        device: device of the tensors.
        grid: the processes.
    """

    windows: Windows
    accumulate: int
    eos_token_id: int | None
    device: str = "cpu"
    grid: Grid = ONE_PROCESS

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, a function of the step alone."""
        shares = self.windows.starts(step).reshape(self.accumulate, self.grid.rows, -1)
        return [
            self._micro_batch(self.windows.read(starts), self.windows.is_stream_start(step))
            for starts in shares[:, self.grid.row]
        ]

    def _micro_batch(self, tokens: Tensor, begins: bool) -> MicroBatch:
        grid, context = self.grid, self.windows.context
        mine = stretch(context, grid.columns, grid.column)
        ids, labels = tokens[:, :-1][:, mine].contiguous(), tokens[:, 1:][:, mine].contiguous()
        length = ids.shape[1]
        first = last = torch.arange(len(ids))
        continues = torch.full((len(ids),), grid.column > 0 or not begins)
        cu_seqlens, parallel = None, None
        if self.eos_token_id is not None:
            continues &= ids[:, 0] != self.eos_token_id
            window_starts = torch.arange(0, ids.numel() + 1, length)
            ids, cu_seqlens = pack(ids, self.eos_token_id)
            labels = labels.view(1, -1)
            bounds = torch.searchsorted(cu_seqlens, window_starts)
            first, last = bounds[:-1], bounds[1:] - 1
        ids, labels, first, last, continues = map(self._move, (ids, labels, first, last, continues))
        if cu_seqlens is not None:
            cu_seqlens = self._move(cu_seqlens)
        if grid.group is not None:
            places = {} if cu_seqlens is None else {"first": first, "last": last, "continues": continues}
            parallel = ContextParallel(grid.group, **places)
        weight = length * grid.columns / context
        return MicroBatch(ids, labels, cu_seqlens, first, last, continues, weight, parallel)

    def _move(self, tensor: Tensor) -> Tensor:
        kind = torch.device(self.device).type
        if kind == "cpu":
            return tensor
        if kind == "cuda":
            # From pinned memory the copy does not wait for the GPU.
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


class CarriedStates:
    """The states at the end of each window, for the windows of the next step that continue the text.

    Args:
        depth: number of the model's blocks.
        width: size of a block's state.
        device: device of the states.
        grid: the processes; those that share a window all keep the state at its end.
    """

    def __init__(self, depth: int, width: int, device: str = "cpu", grid: Grid = ONE_PROCESS) -> None:
        self.depth, self.width, self.device, self.grid = depth, width, device, grid
        # States of each micro-batch, (depth, windows, width).
        self.ends: list[Tensor] = []

    def initial(self, index: int, batch: MicroBatch) -> Tensor:
        """The states that the sequences of micro-batch `index` begin with, `(depth, sequences, width)`."""
        states = torch.zeros(self.depth, batch.sequences, self.width, device=self.device)
        if index < len(self.ends):
            # Not a product with 0: that of a NaN or an infinite state would be NaN.
            ends = torch.where(batch.continues[:, None], self.ends[index], 0.0)
            states.index_copy_(1, batch.first, ends)
        return states

    def keep(self, index: int, batch: MicroBatch, states: Tensor) -> None:
        """Keep the states after micro-batch `index`, `(depth, sequences, width)`, without their graph."""
        ends = states.detach()[:, batch.last]
        if batch.context_parallel is not None:
            ends = batch.context_parallel.from_last(ends)
        self.ends[index : index + 1] = [ends]

    def gathered(self) -> Tensor:
        """The states of all processes in the order of the step's windows, `(depth, windows, width)`."""
        # States of one process in each row of the grid, (rows, micro-batches, depth, windows, width).
        ends = gather(torch.stack(self.ends))[:: self.grid.columns]
        return ends.permute(2, 1, 0, 3, 4).flatten(1, 3).contiguous()

    def load(self, states: Tensor, accumulate: int) -> None:
        """Take this process's share of `(depth, windows, width)` states, saved by any number of processes."""
        shares = states.unflatten(1, (accumulate, self.grid.rows, -1))[:, :, self.grid.row]
        self.ends = list(shares.to(self.device).unbind(1))
