"""Log-probabilities of tokens, and of the likeliest tokens in their places."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhesa.errors import NOT_NUMBERS

# Log-probabilities in fp64 that are in memory at once.
VALUES = 1 << 20


class TokenLogprob(NamedTuple):
    """A token and its log-probability.

    Args:
        start: offset of the token in the text, in bytes.
        token: id of the token.
        logprob: log-probability in nats; `None` for the first token of a text, which nothing predicts.
        top: the likeliest tokens in its place and their log-probabilities, the likeliest first.
    """

    start: int
    token: int
    logprob: float | None
    top: list[tuple[int, float]]


def token_logprobs(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, list[list[tuple[int, float]]]]:
    """Log-probabilities in nats.

    Args:
        logits: `(rows, num_tokens)`.
        targets: a token id for each row, `(rows,)`.
        top: how many of the likeliest tokens to give for each row.

    Returns:
        Those of `targets`, fp64 `(rows,)`, and the likeliest tokens of each row with their log-probabilities.

    Raises:
        FloatingPointError: logits are not numbers.

    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 0)[0].exp().item()
    0.25
    """
    parts, likeliest = [], []
    rows = max(1, VALUES // logits.shape[1])
    for part, wanted in zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True):
        logprobs = part.double().log_softmax(-1)
        parts.append(logprobs.gather(1, wanted[:, None])[:, 0].cpu())
        values, tokens = logprobs.topk(min(top, logits.shape[1]))
        pairs = zip(tokens.tolist(), values.tolist(), strict=True)
        likeliest += [list(zip(*pair, strict=True)) for pair in pairs]
    own = torch.cat(parts)
    if own.isnan().any():
        raise FloatingPointError(NOT_NUMBERS)
    return own, likeliest
