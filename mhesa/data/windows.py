"""Windows: the tokens that a training step reads, which depend on the step and the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mhesa.data.token_files import Tokens
from mhesa.errors import InputError


class Windows:
    """The windows of each step. They depend on step and seed alone, so a resumed run asks for the next step.

    A window is `context` tokens to read and the one after each to predict. Windows do not overlap within a
    pass over the corpus. Every pass has its own random offset and, without streams, its own random order.

    Args:
        tokens: ids, `(tokens,)`.
        context: tokens of a window.
        rows: number of windows in a step.
        seed: seed of the offsets and orders.
        streams: whether row `i` of a step follows row `i` of the step before in the text, so that states
            can be carried.

    Raises:
        InputError: fewer tokens than one window, or than one for each stream.

    >>> windows = Windows(np.arange(100), context=8, rows=4, seed=0)
    >>> windows.starts(step=0).shape, windows.read(windows.starts(step=0)).shape
    ((4,), torch.Size([4, 9]))
    """

    def __init__(
        self, tokens: np.ndarray | Tokens, *, context: int, rows: int, seed: int, streams: bool = False
    ) -> None:
        least = (rows if streams else 1) * context + 1
        if len(tokens) < least:
            what = f"{rows:,} streams of a window of" if streams else "one window of"
            raise InputError(
                f"the training text has {len(tokens):,} tokens, fewer than {what} {context:,} and the "
                "token after it; give more text or a smaller context"
            )
        self.tokens = tokens
        self.context = context
        self.rows = rows
        self.seed = seed
        self.streams = streams
        fit = (len(tokens) - 1) // context
        # One window fewer than fit, which leaves room for the offset.
        self.per_pass = max(fit // rows - 1, 1) if streams else max(fit - 1, 1)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def starts(self, step: int) -> np.ndarray:
        """The first token of each window of a step, `(rows,)`."""
        if self.streams:
            epoch, index = divmod(step, self.per_pass)
            spread = self.per_pass * self.context * np.arange(self.rows)
            return self._offset(epoch, self.rows * self.per_pass) + spread + self.context * index
        places = (divmod(step * self.rows + row, self.per_pass) for row in range(self.rows))
        return np.array([self._order(epoch)[index] for epoch, index in places])

    def epochs(self, steps: float) -> float:
        """How often so many steps read each token of the text, on average."""
        return steps * self.rows * self.context / len(self.tokens)

    def is_stream_start(self, step: int) -> bool:
        """Whether no state is carried into this step: a pass begins with it, or there are no streams."""
        return not self.streams or step % self.per_pass == 0

    def read(self, starts: Sequence[int] | np.ndarray) -> Tensor:
        """The windows at `starts`, each with the token after it, int64 `(windows, context + 1)`."""
        ids = [self.tokens[start : start + self.context + 1] for start in starts]
        return torch.from_numpy(np.stack(ids))

    def _draw_order(self, epoch: int) -> np.ndarray:
        # Offsets and orders have separate generators, so that neither depends on how much the other draws.
        order = np.random.default_rng((self.seed, epoch, 1)).permutation(self.per_pass)
        return self._offset(epoch, self.per_pass) + self.context * order

    def _offset(self, epoch: int, windows: int) -> int:
        room = len(self.tokens) - 1 - windows * self.context
        return int(np.random.default_rng((self.seed, epoch, 0)).integers(room + 1))


def pack(ids: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Join windows into one row, and say where windows and documents begin, to keep their states apart.

    Args:
        ids: `(windows, context)`.
        eos_token_id: the token that a document begins with.

    Returns:
        The ids in one row, `(1, windows * context)`, and where each sequence begins, and the last one ends,
        `(sequences + 1,)`.

    >>> pack(torch.tensor([[5, 6, 9, 7], [9, 1, 2, 3]]), eos_token_id=9)
    (tensor([[5, 6, 9, 7, 9, 1, 2, 3]]), tensor([0, 2, 4, 8]))
    """
    is_start = ids == eos_token_id
    is_start[:, 0] = True
    offsets = is_start.flatten().nonzero()[:, 0]
    return ids.reshape(1, -1), torch.cat([offsets, offsets.new_tensor([ids.numel()])])
