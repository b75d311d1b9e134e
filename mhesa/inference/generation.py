"""Generation: read prompts, then write one token at a time. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.inference.continuation import Continuation
from mhesa.inference.decoder import Decoder
from mhesa.inference.sampling import Sampling, TokenSampler
from mhesa.inference.slots import Slots
from mhesa.model.lm import GatedExponentialSmoothingLM

# Sequences that `generate` continues at a time.
BATCH = 64


def generate(
    model: GatedExponentialSmoothingLM | Decoder,
    ids: Tensor | Sequence[Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | None = None,
    stop: Sequence[bytes] = (),
    decode_bytes: Callable[[list[int]], bytes] | None = None,
) -> list[Tensor]:
    """Continue prompts.

    A prompt's continuation depends on itself, the sampling and its seed, not on the other prompts.

    Args:
        model: the language model, or a `Decoder` made of it, which saves packing its weights again.
        ids: prompts, `(batch, length)`, or one tensor `(length,)` for each, of any lengths, none empty.
        max_new_tokens: largest number of tokens to write for each prompt.
        sampling: how tokens are drawn; plain sampling if omitted.
        seed: makes the result repeatable: one for each prompt, or the first prompt's, from which the others
            count up. `None` draws anew each time.
        eos_token_id: the token to stop at; it is not part of the result.
        stop: stop strings; the token that completes one is the last.
        decode_bytes: the bytes of token ids, a tokenizer's `decode_bytes`; needed for `stop`.

    Returns:
        The new tokens of each prompt, int64 `(length,)` on CPU, without the prompt's own.

    Raises:
        InputError: an empty prompt, an empty stop string, or another number of seeds than of prompts.
        FloatingPointError: the model's logits are not numbers.

    >>> model = GatedExponentialSmoothingLM(num_tokens=16, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> prompts = [torch.tensor([3]), torch.tensor([1, 4, 1])]
    >>> [len(new) for new in generate(model, prompts, max_new_tokens=5)]
    [5, 5]
    """
    if stop and decode_bytes is None:
        raise InputError("stop strings need decode_bytes, to know what text the tokens are")
    prompts = [_not_empty(prompt) for prompt in ids]
    decoder = _decoder(model, min(BATCH, max(1, len(prompts))))
    texts = [
        Continuation(
            TokenSampler(sampling, one),
            max_new_tokens,
            end=eos_token_id,
            decode=decode_bytes and (lambda token: decode_bytes([token])),
            stops=stop,
        )
        for one in _seeds(seed, len(prompts))
    ]
    for text, prompt in zip(texts, prompts, strict=True):
        text.sampler.observe(prompt)
    new: dict[Continuation, list[int]] = {text: [] for text in texts}
    for first in range(0, len(prompts), decoder.max_batch):
        batch = slice(first, first + decoder.max_batch)
        states = decoder.initial_state(len(prompts[batch]))
        for text, token in write(decoder, prompts[batch], texts[batch], states):
            if token != eos_token_id:
                new[text].append(token)
    return [torch.tensor(tokens, dtype=torch.int64) for tokens in new.values()]


def stream(
    model: GatedExponentialSmoothingLM | Decoder,
    ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    eos_token_id: int | None = None,
    state: Tensor | None = None,
) -> Iterator[int]:
    """Continue a prompt, and give each token as it is drawn.

    Args:
        model, max_new_tokens, sampling, seed, eos_token_id: see `generate`.
        ids: the prompt, `(length,)`, at least one token.
        state: `(depth, 1, state_size)`, after what was read before; changed in place, to the state after all
            tokens but the last. `None` starts anew.

    >>> model = GatedExponentialSmoothingLM(num_tokens=16, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> len(list(stream(model, torch.tensor([3]), max_new_tokens=5)))
    5
    """
    decoder, prompt = _decoder(model, 1), _not_empty(ids)
    text = Continuation(TokenSampler(sampling, seed), max_new_tokens, end=eos_token_id)
    text.sampler.observe(prompt)
    state = decoder.initial_state(1) if state is None else state
    return (token for _, token in write(decoder, [prompt], [text], state) if token != eos_token_id)


def write(
    decoder: Decoder,
    prompts: list[Tensor],
    texts: list[Continuation],
    states: Tensor,
    num_tokens: int | None = None,
) -> Iterator[tuple[Continuation, int]]:
    """Continue prompts; yields each token with its text, including a token that ends the text.

    Args:
        decoder, num_tokens: see `Slots`.
        prompts: one for each text, `(length,)`.
        texts: texts to write; all have the same limit.
        states: `(depth, texts, state_size)`; see `stream`.
    """
    if texts[0].finish is not None:
        return
    slots = Slots(decoder, states, num_tokens)
    ended = slots.add(texts, states, decoder.prefill(prompts, states))
    while True:
        for text in slots.texts:
            if text.error is not None:
                raise text.error
        for text in slots.texts:
            assert text.last is not None
            yield text, text.last
        if len(ended) == len(slots.texts):
            return
        for slot in ended:
            slots.remove(slot)
        ended = slots.step()


def _decoder(model: GatedExponentialSmoothingLM | Decoder, batch: int) -> Decoder:
    return model if isinstance(model, Decoder) else Decoder(model, max_batch=batch)


def _seeds(seed: int | Sequence[int] | None, count: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * count
    if isinstance(seed, (int, np.integer)):
        return [int(seed) + index for index in range(count)]
    if len(seed) != count:
        raise InputError(f"{count} prompts need {count} seeds, not {len(seed)}")
    return seed


def _not_empty(ids: Tensor) -> Tensor:
    if ids.ndim != 1 or len(ids) == 0:
        raise InputError(f"a prompt must be (length,) with at least one token, not {tuple(ids.shape)}")
    return ids
