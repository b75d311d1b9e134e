"""The texts being written: their states side by side, those in use always first."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mhesa.inference.decoder import Decoder
from mhesa.inference.sampling import BatchSampler
from mhesa.serve.engine.jobs import Job
from mhesa.serve.engine.text import Choice, Scored


class Row(NamedTuple):
    """A slot in use."""

    job: Job
    choice: Choice


class Slots:
    """A slab of states, so that a step works on a slice of it and nothing is gathered.

    Args:
        decoder: the model.
        most: how many texts there is room for.
    """

    def __init__(self, decoder: Decoder, most: int) -> None:
        self.decoder, self.most = decoder, most
        self.rows: list[Row] = []
        # Should anybody ever read a free slot, everybody shall see it.
        self.states = decoder.initial_state(most).fill_(math.nan)
        self._before = torch.empty_like(self.states)
        self._samplers = BatchSampler(decoder.num_tokens, max_rows=most)

    @property
    def bytes(self) -> int:
        """What a text's state takes."""
        return self.states[:, :1].numel() * self.states.element_size()

    def join(self, job: Job, state: Tensor) -> int:
        """Give each of a job's texts a slot, with a copy of the state; which one is the first."""
        first = len(self.rows)
        for choice in job.choices:
            self.rows.append(Row(job, choice))
            self._samplers.append(choice.sampler)
        self.states[:, first : len(self.rows)] = state
        return first

    def leave(self, index: int) -> None:
        """Free a slot: the last one's text moves into it."""
        last = len(self.rows) - 1
        row = self.rows.pop()
        if index != last:
            self.states[:, index] = self.states[:, last]
            self.rows[index] = row
        self.states[:, last] = math.nan
        self._samplers.take_out(index)

    def state(self, index: int) -> Tensor:
        """A copy of a text's state, `(depth, 1, dim_mhesa)`."""
        return self.states[:, index : index + 1].clone()

    def step(self) -> Tensor:
        """Read the tokens drawn last, one of each text; if that raises, nothing has changed.

        Returns:
            Logits of what comes next, `(texts, num_tokens)`.
        """
        count = len(self.rows)
        states, before = self.states[:, :count], self._before[:, :count]
        before.copy_(states)
        try:
            return self.decoder.step(self._ids(0, count), states)
        except Exception:
            states.copy_(before)
            raise

    def step_one(self, index: int) -> Tensor:
        """The same for one text alone, whose state is spoilt if it raises."""
        return self.decoder.step(self._ids(index, index + 1), self.states[:, index : index + 1])

    def _ids(self, first: int, last: int) -> Tensor:
        return self._samplers.last[first:last].to(self.decoder.device)

    def draw(self, logits: Tensor, first: int) -> list[int]:
        """A token for each row of `logits`, of the slots from `first` on; -1 where they are no numbers."""
        tokens = self._samplers.draw(logits, first)
        rows = self.rows[first : first + len(tokens)]
        wanted = [
            index
            for index, (row, token) in enumerate(zip(rows, tokens, strict=True))
            if row.choice.top is not None and 0 <= token != row.choice.vocabulary.end
        ]
        if wanted:
            self._note(logits, rows, tokens, wanted)
        return tokens

    @staticmethod
    def _note(logits: Tensor, rows: list[Row], tokens: list[int], wanted: list[int]) -> None:
        """Keep the log-probabilities of those that asked for them."""
        targets = torch.tensor([tokens[index] for index in wanted])
        most = max(rows[index].choice.top or 0 for index in wanted)
        own, likeliest = score(logits[wanted], targets, most)
        for index, logprob, top in zip(wanted, own.tolist(), likeliest, strict=True):
            choice = rows[index].choice
            choice.scores.append(Scored(len(choice.data), tokens[index], logprob, top[: choice.top]))


def score(logits: Tensor, targets: Tensor, top: int) -> tuple[Tensor, list[list[tuple[int, float]]]]:
    """Log-probabilities in nats of `targets`, `(rows,)`, under `logits`, `(rows, num_tokens)`.

    Returns:
        fp64 `(rows,)`, and for each row the `top` likeliest tokens with theirs.

    >>> score(torch.zeros(1, 4), torch.tensor([2]), 0)[0].exp().item()
    0.25
    """
    logprobs = logits.double().log_softmax(-1)
    own = logprobs.gather(1, targets.to(logits.device)[:, None])[:, 0].cpu()
    values, tokens = logprobs.topk(min(top, logits.shape[1]))
    return own, [list(zip(*pair, strict=True)) for pair in zip(tokens.tolist(), values.tolist(), strict=True)]
