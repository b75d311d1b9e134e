"""Generation: read prompts, then one token at a time. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder
from mhesa.inference.sampling import BatchSampler, Sampling, TokenSampler
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
        max_new_tokens: how many tokens to make for each at most.
        sampling: how tokens are drawn; plain sampling if omitted.
        seed: makes the result repeatable: one for each prompt, or the first one's, the next ones' being
            one more each. `None` draws anew each time.
        eos_token_id: the token to stop at; it is not given out.
        stop: texts to stop behind.
        decode_bytes: what text tokens are, a tokenizer's `decode_bytes`; needed for `stop`.

    Returns:
        The new tokens of each prompt, int64 `(length,)` on CPU, without the prompt's own.

    Raises:
        InputError: an empty prompt, or as many seeds as there are prompts were not given.
        FloatingPointError: the model gave logits that are not numbers.

    >>> model = GatedExponentialSmoothingLM(num_tokens=16, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> prompts = [torch.tensor([3]), torch.tensor([1, 4, 1])]
    >>> [len(new) for new in generate(model, prompts, max_new_tokens=5)]
    [5, 5]
    """
    prompts = list(ids)
    seeds = _seeds(seed, len(prompts))
    decoder = _decoder(model, min(BATCH, max(1, len(prompts))))
    endings = _Endings(stop, decode_bytes, len(prompts))
    out: list[list[int]] = [[] for _ in prompts]
    samplers = [TokenSampler(sampling, seed) for seed in seeds]
    for first in range(0, len(prompts), decoder.max_batch):
        rows = range(first, min(first + decoder.max_batch, len(prompts)))
        _continue(decoder, prompts, samplers, rows, max_new_tokens, eos_token_id, endings, out)
    return [torch.tensor(tokens, dtype=torch.int64) for tokens in out]


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
    """Continue a prompt, token by token as they are made.

    Args:
        model, max_new_tokens, sampling, seed, eos_token_id: see `generate`.
        ids: the prompt, `(length,)`, at least one token.
        state: `(depth, 1, dim_mhesa)`, what was read before; it is moved on behind every token but the
            last. `None` starts anew.

    >>> model = GatedExponentialSmoothingLM(num_tokens=16, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> len(list(stream(model, torch.tensor([3]), max_new_tokens=5)))
    5
    """
    decoder, sampler = _decoder(model, 1), TokenSampler(sampling, seed)
    state = decoder.initial_state(1) if state is None else state
    sampler.observe(_not_empty(ids))
    if max_new_tokens < 1:
        return
    samplers = BatchSampler(decoder.num_tokens, [sampler])
    logits = decoder.prefill(ids[None], state)
    for left in reversed(range(max_new_tokens)):
        (token,) = _numbers(samplers.draw(logits))
        if token == eos_token_id:
            return
        yield token
        if left:
            logits = decoder.step(samplers.last, state)


def _continue(
    decoder: Decoder,
    prompts: list[Tensor],
    samplers: list[TokenSampler],
    batch: Iterable[int],
    max_new_tokens: int,
    eos_token_id: int | None,
    endings: _Endings,
    out: list[list[int]],
) -> None:
    """Continue a batch of the prompts to their ends; what has ended leaves the batch."""
    rows = list(batch)
    state = decoder.initial_state(len(rows))
    for row in rows:
        samplers[row].observe(_not_empty(prompts[row]))
    drawing = BatchSampler(decoder.num_tokens, [samplers[row] for row in rows])
    logits = decoder.prefill([prompts[row] for row in rows], state)
    for _ in range(max_new_tokens):
        tokens = _numbers(drawing.draw(logits))
        going = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if token == eos_token_id:
                continue
            out[row].append(token)
            if len(out[row]) < max_new_tokens and not endings.met(row, token):
                going.append(place)
        if not going:
            return
        if len(going) < len(rows):
            state, rows = state[:, going], [rows[place] for place in going]
            drawing = BatchSampler(decoder.num_tokens, [samplers[row] for row in rows])
        logits = decoder.step(torch.tensor([tokens[place] for place in going]), state)


class _Endings:
    """Tells for each sequence when its text has come to one of some endings."""

    def __init__(
        self, stop: Sequence[bytes], decode_bytes: Callable[[list[int]], bytes] | None, sequences: int
    ) -> None:
        if stop and decode_bytes is None:
            raise InputError("stop texts need decode_bytes, to know what text the tokens are")
        if b"" in stop:
            raise InputError("a stop text must not be empty")
        self.stop, self.decode_bytes = tuple(stop), decode_bytes
        self.longest = max(map(len, stop), default=0)
        self.tails = [b""] * sequences

    def met(self, row: int, token: int) -> bool:
        """Add a token to a sequence's text; whether an ending lies in it now."""
        if self.decode_bytes is None or not self.stop:
            return False
        piece = self.decode_bytes([token])
        tail = self.tails[row] + piece
        self.tails[row] = tail[-self.longest :]
        return any(ending in tail for ending in self.stop)


def _decoder(model: GatedExponentialSmoothingLM | Decoder, batch: int) -> Decoder:
    return model if isinstance(model, Decoder) else Decoder(model, max_batch=batch)


def _seeds(seed: int | Sequence[int] | None, count: int) -> Sequence[int | None]:
    if seed is None:
        return [None] * count
    if isinstance(seed, int):
        return [seed + index for index in range(count)]
    if len(seed) != count:
        raise InputError(f"{count} prompts need {count} seeds, not {len(seed)}")
    return seed


def _not_empty(ids: Tensor) -> Tensor:
    if ids.ndim != 1 or len(ids) == 0:
        raise InputError(f"a prompt must be (length,) with at least one token, not {tuple(ids.shape)}")
    return ids


def _numbers(tokens: list[int]) -> list[int]:
    if -1 in tokens:
        raise FloatingPointError("the model's logits are not numbers; its weights may be broken")
    return tokens


def until(pieces: Iterable[bytes], endings: Sequence[bytes]) -> Iterator[bytes]:
    """Hand text on as it comes, up to the first of the endings and without it.

    What may be the beginning of an ending is held back until it is clear.

    >>> b"".join(until([b"one ", b"two", b"\\n", b"\\nthree"], [b"\\n\\n", b"four"]))
    b'one two'
    """
    waiting = b""
    for piece in pieces:
        waiting += piece
        found = [place for ending in endings if (place := waiting.find(ending)) >= 0]
        if found:
            yield waiting[: min(found)]
            return
        safe = len(waiting) - held(waiting, endings)
        yield waiting[:safe]
        waiting = waiting[safe:]
    yield waiting


def held(text: bytes, endings: Sequence[bytes]) -> int:
    """How many bytes at the end of `text` may be the beginning of an ending.

    >>> held(b"one, tw", [b"two", b"wow"])
    2
    """
    longest = min(len(text), max(map(len, endings), default=1) - 1)
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if any(end.startswith(text[-size:]) for end in endings)), 0)
