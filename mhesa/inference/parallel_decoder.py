"""Predicting one text by several processes, each of which reads a stretch of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mhesa.inference.statistics import check_numbers
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.context_parallel import ContextParallel, stretch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Tokens whose logits a process holds at once.
WINDOW = 4096


class ParallelDecoder:
    """A model that all processes of a group run over one text; every process calls this with the same text.

    Args:
        model: the language model, in evaluation mode; its weights may be sharded over the group.
        group: the processes.
    """

    def __init__(self, model: GatedExponentialSmoothingLM, group: ProcessGroup) -> None:
        self._model, self._parallel = model, ContextParallel(group)
        self.processes = self._parallel.size

    def initial_state(self, batch: int) -> Tensor:
        """The state before any token, `(depth, batch, state_size)` of zeros."""
        return self._model.initial_state(batch)

    def surprisal(self, inputs: Tensor, targets: Tensor, state: Tensor) -> np.ndarray:
        """Read tokens of one sequence, and find how surprising the token after each is.

        Args:
            inputs: ids to read, int64 `(length,)`.
            targets: the id to predict after each, `(length,)`.
            state: `(depth, 1, state_size)`, changed in place.

        Returns:
            Bits, fp64 `(length,)`, the same in every process; see `Decoder.surprisal`.

        Raises:
            FloatingPointError: logits are not numbers.
        """
        size = WINDOW * self.processes
        windows = zip(inputs.split(size), targets.split(size), strict=True)
        nats = torch.cat([self._nats(*window, state) for window in windows])
        return check_numbers(nats.double().cpu().numpy() / math.log(2))

    @torch.no_grad()
    def _nats(self, inputs: Tensor, targets: Tensor, state: Tensor) -> Tensor:
        parallel, length = self._parallel, len(inputs)
        if length < parallel.size:
            # Too short to be shared: every process reads all of it.
            nats, final = self._read(inputs, targets, state, None)
            state.copy_(final)
            return nats
        stretches = [stretch(length, parallel.size, rank) for rank in range(parallel.size)]
        mine = stretches[parallel.rank]
        nats, final = self._read(inputs[mine], targets[mine], state, parallel)
        state.copy_(parallel.from_last(final))
        longest = max(part.stop - part.start for part in stretches)
        gathered = parallel.gather(F.pad(nats, (0, longest - len(nats))))
        pairs = zip(gathered, stretches, strict=True)
        return torch.cat([theirs[: part.stop - part.start] for theirs, part in pairs])

    def _read(
        self, inputs: Tensor, targets: Tensor, state: Tensor, parallel: ContextParallel | None
    ) -> tuple[Tensor, Tensor]:
        ids = inputs[None].to(state.device)
        logits, final = self._model(ids, state=state, return_state=True, context_parallel=parallel)
        return F.cross_entropy(logits[0].float(), targets.to(logits.device), reduction="none"), final
