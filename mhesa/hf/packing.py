"""Padded and packed batches: where their tokens are, and conversion between the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mhesa.model.loss import IGNORED_LABEL


def real_tokens(attention_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask of the current chunk's real tokens, `(batch, length)`; `None` if there is no padding."""
    if attention_mask is None:
        return None
    batch, length = x.shape[:2]
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < length:
        raise ValueError(f"attention_mask must be ({batch}, {length}) or longer for this batch, not {shape}")
    real = attention_mask[:, shape[1] - length :].bool()
    return None if real.all() else real


def offsets(
    cu_seqlens: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """Offsets of packed sequences, `(sequences + 1,)`, from any of the arguments; `None` if not packed."""
    if cu_seqlens is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is not None or attention_mask is not None:
        return cu_seqlens
    position_ids = kwargs.get("position_ids")
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[0] != 1:
        return None
    starts = (position_ids[0, 1:] == 0).nonzero().flatten() + 1
    if not len(starts):
        return None
    return torch.cat([starts.new_zeros(1), starts, starts.new_tensor([position_ids.shape[1]])])


def without_first_tokens(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Labels `(batch, length)` that ignore the first token of each packed sequence: nothing predicts it."""
    if cu_seqlens is None:
        return labels
    starts = cu_seqlens[cu_seqlens < labels.shape[1]].long()
    return labels.index_fill(1, starts, IGNORED_LABEL)


def unpack(packed: Tensor, real: Tensor | None) -> Tensor:
    """Packed values `(1, total, dim)` as `(batch, length, dim)`, with zeros at padding."""
    if real is None:
        return packed
    values = packed.new_zeros(*real.shape, packed.shape[-1])
    values[real] = packed[0]
    return values
