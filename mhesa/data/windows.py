"""Windows: which tokens a step reads, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import InputError


class Ids(Protocol):
    """Token ids that can be sliced: an array, or a file of them."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, place: slice) -> np.ndarray:
        """Some of them."""


class Windows:
    """Where the windows of each step begin, in an order that step and seed alone decide.

    A stopped run goes on by asking for the next step. Every pass over the corpus has an offset and an
    order of its own; a window gives `context` tokens to read and as many to predict.

    Args:
        tokens: `(tokens,)` ids.
        context: tokens a window.
        rows: windows a step.
        seed: what offsets and orders are drawn from.
        streams: whether row `i` of a step goes on where row `i` of the step before stopped, for states
            that are carried; otherwise windows come in random order.

    Raises:
        InputError: fewer tokens than one window, or than one for each stream.

    >>> windows = Windows(np.arange(100), context=8, rows=4, seed=0)
    >>> windows.starts(step=0).shape, windows.read(windows.starts(step=0)).shape
    ((4,), torch.Size([4, 9]))
    """

    def __init__(self, tokens: Ids, *, context: int, rows: int, seed: int, streams: bool = False) -> None:
        least = (rows if streams else 1) * context + 1
        if len(tokens) < least:
            what = f"{rows:,} streams of a window of" if streams else "one window of"
            raise InputError(
                f"the training text has {len(tokens):,} tokens, fewer than {what} {context:,} and the "
                "token behind it; give more text or a smaller context"
            )
        self.tokens = tokens
        self.context = context
        self.rows = rows
        self.seed = seed
        self.streams = streams
        fit = (len(tokens) - 1) // context
        # One window less than fits leaves room for the offset.
        self.per_pass = max(fit // rows - 1, 1) if streams else max(fit - 1, 1)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def starts(self, step: int) -> np.ndarray:
        """Where the windows of a step begin, `(rows,)`."""
        if self.streams:
            nth, index = divmod(step, self.per_pass)
            spread = self.per_pass * self.context * np.arange(self.rows)
            return self._offset(nth, self.rows * self.per_pass) + spread + self.context * index
        places = (divmod(step * self.rows + row, self.per_pass) for row in range(self.rows))
        return np.array([self._order(nth)[index] for nth, index in places])

    def begins(self, step: int) -> bool:
        """Whether the streams start anew with this step, so that no state goes into it."""
        return not self.streams or step % self.per_pass == 0

    def read(self, starts: Sequence[int] | np.ndarray) -> Tensor:
        """The windows that begin there, each with the token behind it: `(windows, context + 1)`."""
        ids = [self.tokens[start : start + self.context + 1] for start in starts]
        return torch.from_numpy(np.stack(ids))

    def _draw_order(self, nth: int) -> np.ndarray:
        # Offsets and orders are drawn from generators of their own, so that neither moves the other.
        order = np.random.default_rng((self.seed, nth, 1)).permutation(self.per_pass)
        return self._offset(nth, self.per_pass) + self.context * order

    def _offset(self, nth: int, windows: int) -> int:
        room = len(self.tokens) - 1 - windows * self.context
        return int(np.random.default_rng((self.seed, nth, 0)).integers(room + 1))


def pack(ids: Tensor, eos_token_id: int) -> tuple[Tensor, Tensor]:
    """Windows end to end, parted where a window or a document begins, so that no state goes across.

    Args:
        ids: `(windows, context)`.
        eos_token_id: the token that a document begins with.

    Returns:
        Packed ids `(1, windows * context)`, and offsets `(sequences + 1,)`.

    >>> pack(torch.tensor([[5, 6, 9, 7], [9, 1, 2, 3]]), eos_token_id=9)
    (tensor([[5, 6, 9, 7, 9, 1, 2, 3]]), tensor([0, 2, 4, 8]))
    """
    begins = ids == eos_token_id
    begins[:, 0] = True
    offsets = begins.flatten().nonzero()[:, 0]
    return ids.reshape(1, -1), torch.cat([offsets, offsets.new_tensor([ids.numel()])])
