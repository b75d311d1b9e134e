"""Padded and packed batches: where their tokens are, and conversion between the two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Padding:
    """Takes the padding out of a batch: the real tokens of its rows become packed sequences.

    A compiler needs shapes that do not depend on the mask. There the padding stays, as one more sequence
    after the others.

    Args:
        real: which tokens are not padding, `(batch, length)`.

    Attributes:
        cu_seqlens: offsets of the packed sequences, `(sequences + 1,)`.
    """

    def __init__(self, real: Tensor) -> None:
        self.real = real
        ends = real.sum(dim=1).cumsum(dim=0)
        if torch.compiler.is_compiling():
            self._places = torch.argsort((~real).flatten().int(), stable=True)
            self.cu_seqlens = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), real.numel())])
        else:
            self._places = real.flatten().nonzero().flatten()
            self.cu_seqlens = F.pad(ends, (1, 0))

    def pack(self, x: Tensor) -> Tensor:
        """Values of `(batch, length, dim)` as `(1, total, dim)`."""
        return x.flatten(0, 1)[self._places][None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Packed values of `(1, total, dim)` as `(batch, length, dim)`, zeros at padding."""
        values = packed.new_zeros(self.real.numel(), packed.shape[-1])
        values = values.index_copy(0, self._places, packed[0]).unflatten(0, self.real.shape)
        return values.masked_fill(~self.real[..., None], 0) if torch.compiler.is_compiling() else values

    def pack_states(self, states: list[Tensor] | None) -> list[Tensor] | None:
        """States of the rows, `(batch, state_size)` each, as states of the sequences."""
        if states is None or not torch.compiler.is_compiling():
            return states
        return [F.pad(state, (0, 0, 0, 1)) for state in states]

    def unpack_states(self, states: list[Tensor]) -> list[Tensor]:
        """States of the sequences as states of the rows, `(batch, state_size)` each."""
        return [state[: len(self.real)] for state in states]


def real_tokens(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Which tokens of this call are not padding, `(batch, length)`; `None` where none is.

    Args:
        attention_mask: `(batch, length)`, or longer where it also covers earlier tokens.
        x: this call's ids, `(batch, length)`, or embeddings, `(batch, length, dim)`.

    Raises:
        ValueError: the mask does not fit.
    """
    if attention_mask is None:
        return None
    batch, length = x.shape[:2]
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(f"attention_mask must be ({batch}, {length}) or longer for this batch, not {shape}")
    real = attention_mask[:, shape[1] - length :].bool()
    return None if not torch.compiler.is_compiling() and real.all() else real


def offsets(
    cu_seqlens: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Offsets of packed sequences, `(sequences + 1,)`; `None` if nothing is packed.

    Args:
        cu_seqlens: the offsets, if they are known.
        attention_mask: given with sequences that are padded, and not packed.
        kwargs: `cu_seq_lens_q`, other offsets, or what they follow from, `(1, length)`: `position_ids` that
            start again at 0, or `seq_idx`.

    Raises:
        ValueError: several sequences in a row of a larger batch.
    """
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None or attention_mask is not None:
        return cu_seqlens
    if (position_ids := kwargs.get("position_ids")) is not None:
        first = position_ids[..., 1:] == 0
    elif (seq_idx := kwargs.get("seq_idx")) is not None:
        first = seq_idx.diff() != 0
    else:
        return None
    if not first.any():
        return None
    if len(first) != 1:
        raise ValueError("pack sequences into a batch of 1, or pass an attention_mask where they are padded")
    starts = first[0].nonzero().flatten() + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_tensor([first.shape[1] + 1])])


def next_tokens(labels: Tensor, cu_seqlens: Tensor | None, ignored: int) -> Tensor:
    """The label of each place's next token, `(batch, length)`; `ignored` at the end of a sequence.

    Args:
        labels: the label of each token, `(batch, length)`.
        cu_seqlens: offsets of packed sequences, `(sequences + 1,)`; none if `None`.
        ignored: the label that the loss ignores.
    """
    following = F.pad(labels, (0, 1), value=ignored)
    if cu_seqlens is not None:
        following = following.index_fill(1, cu_seqlens.long(), ignored)
    return following[:, 1:].contiguous()
