"""Log-probabilities of tokens, and of the likeliest tokens in their places."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenScore(NamedTuple):
    """A token and its log-probability.

    Args:
        start: where its bytes begin in the text.
        token: its id.
        logprob: in nats.
        top: the likeliest tokens in its place and their log-probabilities, the likeliest first.
    """

    start: int
    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, list[list[tuple[int, float]]]]:
    """Log-probabilities in nats.

    Args:
        logits: `(rows, num_tokens)`.
        targets: a token id for each row, `(rows,)`.
        top: how many of the likeliest tokens to give for each row.

    Returns:
        Those of `targets`, fp64 `(rows,)`, and the likeliest tokens of each row with their log-probabilities.

    >>> import torch
    >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2]), 0)[0].exp().item()
    0.25
    """
    logprobs = logits.double().log_softmax(-1)
    own = logprobs.gather(1, targets.to(logits.device)[:, None])[:, 0].cpu()
    values, tokens = logprobs.topk(min(top, logits.shape[1]))
    return own, [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
