"""Slots: the states and samplers of texts that are written together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhesa.inference.continuation import Continuation
from mhesa.inference.decoder import Decoder
from mhesa.inference.logprobs import TokenLogprob, token_logprobs
from mhesa.inference.sampling import BatchSampler


class Slots:
    """Writes several texts at once; texts are added and removed between two steps.

    Each text has a slot, a place in `states` and in the sampler. The slots in use are always the first ones,
    so that a step works on a slice of `states` and copies nothing.

    Args:
        decoder: the model.
        states: `(depth, slots, state_size)`, changed in place: of each text, the state after all of its
            tokens but the last.
        num_tokens: the size of the tokenizer, if the model's vocabulary is larger: later ids are never drawn.

    Attributes:
        used_states: those of `states` that belong to a text.
    """

    def __init__(self, decoder: Decoder, states: Tensor, num_tokens: int | None = None) -> None:
        self.decoder, self.states = decoder, states
        self.texts: list[Continuation] = []
        self._sampler = BatchSampler(num_tokens or decoder.num_tokens, max_rows=states.shape[1])
        self._make_views()

    def add(self, texts: Sequence[Continuation], state: Tensor, logits: Tensor) -> list[int]:
        """Give each text a slot, and draw its first token.

        Args:
            texts: texts to write.
            state: `(depth, texts, state_size)`, after the prompts; `(depth, 1, state_size)` of a shared one.
            logits: `(texts, num_tokens)`, predictions after the prompts; `(1, num_tokens)` of a shared one.

        Returns:
            As `draw` does.
        """
        first = len(self.texts)
        for text in texts:
            self.texts.append(text)
            self._sampler.append(text.sampler)
        self._make_views()
        self.used_states[:, first:] = state
        return self.draw(logits.expand(len(texts), -1), first)

    def remove(self, slot: int) -> None:
        """Free a slot; the last text moves into it."""
        last = len(self.texts) - 1
        text = self.texts.pop()
        if slot != last:
            self.states[:, slot] = self.states[:, last]
            self.texts[slot] = text
        # Reading a free slot by mistake then fails: its logits are not numbers.
        self.states[:, last] = math.nan
        self._sampler.take_out(slot)
        self._make_views()

    def step(self) -> list[int]:
        """Read the last token of each text and draw the next one; returns what `draw` does."""
        return self.draw(self.read())

    def read(self, slot: int | None = None) -> Tensor:
        """Read the last token of each text, or of the text in one slot.

        Returns:
            Logits of what comes next, `(texts, num_tokens)`.
        """
        ids, states = self._last_tokens, self.used_states
        if slot is not None:
            ids, states = ids[slot : slot + 1], states[:, slot : slot + 1]
        return self.decoder.step(ids.to(self.decoder.device), states)

    def draw(self, logits: Tensor, first: int = 0) -> list[int]:
        """Draw a token for some texts.

        Args:
            logits: logits of the texts in slots from `first` on, `(texts, num_tokens)`.
            first: the first of these slots.

        Returns:
            The slots of texts that have ended or failed, the highest first, to be removed in this order.
        """
        tokens = self._sampler.draw(logits, first)
        texts = self.texts[first : first + len(tokens)]
        _note_scores(logits, texts, tokens)
        ended = []
        for slot, (text, token) in enumerate(zip(texts, tokens, strict=True), first):
            text.take(token)
            if text.finish is not None or text.error is not None:
                ended.append(slot)
        return ended[::-1]

    def _make_views(self) -> None:
        # Not at each step: they take 3 us to make, and a step of a small model takes 80.
        count = len(self.texts)
        self.used_states, self._last_tokens = self.states[:, :count], self._sampler.last[:count]


def _note_scores(logits: Tensor, texts: list[Continuation], tokens: list[int]) -> None:
    """Note the log-probabilities of tokens for the texts that ask for them."""
    wanted = [
        row
        for row, (text, token) in enumerate(zip(texts, tokens, strict=True))
        if text.top is not None and token >= 0
    ]
    if not wanted:
        return
    most = max(texts[row].top or 0 for row in wanted)
    own, likeliest = token_logprobs(logits[wanted], torch.tensor([tokens[row] for row in wanted]), most)
    for row, logprob, top in zip(wanted, own.tolist(), likeliest, strict=True):
        text = texts[row]
        text.scores.append(TokenLogprob(text.size, tokens[row], logprob, top[: text.top]))
