"""Drawing the next token from logits: settings, a random stream for each sequence, one draw for a batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    In this order: the repetition penalty, the temperature, then what `top_k`, `top_p` and `min_p` leave, as
    transformers does.

    Args:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: keep the `k` likeliest tokens, of equal ones those with lower ids; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach `p` (nucleus sampling,
            https://arxiv.org/abs/1904.09751); 1 keeps all.
        min_p: keep tokens at least `p` times as likely as the likeliest (https://arxiv.org/abs/2407.01082);
            0 keeps all.
        repetition_penalty: divides positive logits of tokens that the sequence already has, multiplies
            negative ones (https://arxiv.org/abs/1909.05858); 1 changes nothing.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")


class Sampler:
    """Draws the tokens of one sequence.

    It owns the sequence's random stream: what it draws depends on its seed and the logits it has seen, not
    on other sequences.

    Args:
        sampling: how tokens are drawn.
        seed: 0 or more; makes the draws repeatable. `None` draws anew each time.

    Raises:
        InputError: a negative seed.

    >>> draw(torch.tensor([[0.0, 2.0, 1.0]]), [Sampler(Sampling(temperature=0))])
    [1]
    """

    def __init__(self, sampling: Sampling | None = None, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        self.sampling = sampling or Sampling()
        self.random = np.random.Generator(np.random.PCG64(seed))
        self.seen: set[int] = set()
        self._settings = (
            self.sampling.temperature,
            float(self.sampling.top_k),
            self.sampling.top_p,
            self.sampling.min_p,
            self.sampling.repetition_penalty,
        )

    def observe(self, ids: Tensor | Iterable[int]) -> None:
        """Take note of tokens that the sequence has, for the repetition penalty."""
        if self.sampling.repetition_penalty != 1:
            self.seen.update(ids.unique().tolist() if isinstance(ids, Tensor) else ids)

    def row(self) -> tuple[float, ...]:
        """The settings and a random number, as the kernel takes them."""
        return (*self._settings, self.random.random())


def draw(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Draw one token a sequence.

    Args:
        logits: `(batch, num_tokens)`, on any device.
        samplers: one for each row; each moves on by one draw.

    Returns:
        A token for each row; -1 for a row whose logits are not numbers.
    """
    from mhesa.sampling_kernel import draw_rows

    values = logits.detach().cpu()
    if values.dtype != torch.float64:
        values = values.float()
    if values.stride(1) != 1:
        values = values.contiguous()
    settings = np.array([sampler.row() for sampler in samplers])
    tokens = draw_rows(values, settings, [sampler.seen for sampler in samplers])
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.observe((token,))
    return tokens
