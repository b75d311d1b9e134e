"""The micro-batches of each step, and the states that are carried from one step's windows to the next's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mhesa.data import Windows, pack
from mhesa.training.distributed import gather, processes, rank


@dataclass(frozen=True)
class MicroBatch:
    """The tokens of one forward pass.

    Args:
        ids: `(windows, context)`, or `(1, windows * context)` where documents are packed.
        labels: the token after each, in the same shape.
        cu_seqlens: where packed sequences begin, `(sequences + 1,)`; `None` if each window is one sequence.
        first, last: the indices of each window's first and last sequence, `(windows,)`.
        continues: whether its first sequence continues the window before it in the text, `(windows,)`.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor | None
    first: Tensor
    last: Tensor
    continues: Tensor

    @property
    def sequences(self) -> int:
        """How many sequences it holds."""
        return len(self.ids) if self.cu_seqlens is None else len(self.cu_seqlens) - 1


@dataclass(frozen=True)
class Batches:
    """This process's share of every step's windows.

    Args:
        windows: where each step's windows begin.
        accumulate: micro-batches a step.
        eos_token_id: begin a sequence at each of these tokens; with `None`, a window is one sequence.
        device: where the tensors go.
    """

    windows: Windows
    accumulate: int
    eos_token_id: int | None
    device: str = "cpu"

    def read(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, a function of the step alone."""
        shares = self.windows.starts(step).reshape(self.accumulate, processes(), -1)
        return [
            self._micro_batch(self.windows.read(starts), self.windows.is_stream_start(step))
            for starts in shares[:, rank()]
        ]

    def _micro_batch(self, tokens: Tensor, begins: bool) -> MicroBatch:
        ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        first = last = torch.arange(len(ids))
        continues = torch.full((len(ids),), not begins)
        cu_seqlens = None
        if self.eos_token_id is not None:
            continues &= ids[:, 0] != self.eos_token_id
            window_starts = torch.arange(0, ids.numel() + 1, self.windows.context)
            ids, cu_seqlens = pack(ids, self.eos_token_id)
            labels = labels.view(1, -1)
            bounds = torch.searchsorted(cu_seqlens, window_starts)
            first, last = bounds[:-1], bounds[1:] - 1
        tensors = (ids, labels, cu_seqlens, first, last, continues)
        return MicroBatch(*map(self._move, tensors))  # type: ignore[arg-type]

    def _move(self, tensor: Tensor | None) -> Tensor | None:
        kind = torch.device(self.device).type
        if tensor is None or kind == "cpu":
            return tensor
        if kind == "cuda":
            # From pinned memory the copy does not wait for the GPU.
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)


class CarriedStates:
    """The states at the end of each window, for the windows of the next step that continue the text.

    Args:
        depth: blocks of the model.
        width: of a block's state.
        device: where the states are.
    """

    def __init__(self, depth: int, width: int, device: str = "cpu") -> None:
        self.depth, self.width, self.device = depth, width, device
        # Of each micro-batch, (depth, windows, width).
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
        self.ends[index : index + 1] = [states.detach()[:, batch.last]]

    def gathered(self) -> Tensor:
        """The states of all processes in the order of the step's windows, `(depth, windows, width)`."""
        # From (processes, micro-batches, depth, windows, width).
        return gather(torch.stack(self.ends)).permute(2, 1, 0, 3, 4).flatten(1, 3).contiguous()

    def load(self, states: Tensor, accumulate: int) -> None:
        """Take this process's share of `states`, `(depth, windows, width)`, of any number of them."""
        shares = states.unflatten(1, (accumulate, processes(), -1))[:, :, rank()]
        self.ends = list(shares.to(self.device).unbind(1))
