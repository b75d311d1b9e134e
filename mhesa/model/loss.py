"""The loss of a language model: cross-entropy, in chunks where the vocabulary is large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhesa.errors import InputError
from mhesa.ops.smoothing import accumulation_dtype

# From this vocabulary on, a batch's logits take more memory than all else.
LARGE_VOCABULARY = 8192
IGNORED_LABEL = -100


def next_token_loss(hidden: Tensor, head: nn.Linear, labels: Tensor) -> Tensor:
    """The mean cross-entropy of the logits `head(hidden)`, in nats, a scalar in fp32 (fp64 for fp64 logits).

    From `LARGE_VOCABULARY` tokens on, the logits are computed chunk by chunk and are never all in memory.

    Args:
        hidden: what the last block gives, `(batch, length, dim)`.
        head: from `dim` to the vocabulary, without bias.
        labels: the token to predict at each place, `(batch, length)`; -100 is ignored.

    >>> hidden, labels = torch.randn(2, 5, 8), torch.randint(11, (2, 5))
    >>> next_token_loss(hidden, nn.Linear(8, 11, bias=False), labels).shape
    torch.Size([])
    """
    if labels.shape != hidden.shape[:2]:
        raise InputError(f"labels must be {tuple(hidden.shape[:2])}, as the ids, not {tuple(labels.shape)}")
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    if head.out_features >= LARGE_VOCABULARY:
        return _chunked_loss(hidden, head.weight, labels)
    logits = head(hidden)
    return F.cross_entropy(logits.to(accumulation_dtype(logits.dtype)), labels)


def _chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """`next_token_loss` of `(tokens, dim)` and `(tokens,)`, a few tokens at a time."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        # Its own mean adds up in the type of `hidden`, and a sum of thousands in bf16 is a fifth too small.
        losses = F.linear_cross_entropy(
            hidden, weight, labels, reduction="none", options=nn.LinearCrossEntropyOptions()
        )
    return losses.to(accumulation_dtype(hidden.dtype)).sum() / (labels != IGNORED_LABEL).sum()
