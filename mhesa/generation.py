"""Generation: read a prompt, then one token at a time. Token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.model import GatedExponentialSmoothingLM, run_blocks

WINDOW = 4096


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Args:
        temperature: divides the logits; 0 takes the likeliest token always.
        top_k: keep the `k` likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach `p`; 1 keeps all.

    Raises:
        InputError: a value out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw one token a row.

        Args:
            logits: `(batch, num_tokens)`.
            generator: where randomness comes from; torch's own if omitted.

        Returns:
            ids, `(batch,)`.

        >>> Sampling(temperature=0).draw(torch.tensor([[0.0, 2.0, 1.0]])).item()
        1
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        # Relative to the likeliest, or a small temperature would overflow.
        scaled = (logits.double() - logits.max(-1, keepdim=True).values.double()) / self.temperature
        if 0 < self.top_k < scaled.shape[-1]:
            scaled = scaled.masked_fill(scaled < scaled.topk(self.top_k).values[:, -1:], -torch.inf)
        if self.top_p < 1:
            scaled = _keep_top_p(scaled, self.top_p)
        return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]


def _keep_top_p(logits: Tensor, p: float) -> Tensor:
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = descending.softmax(-1)
    # A token goes if those before it reach p by themselves; the likeliest always stays.
    beyond = probabilities.cumsum(-1) - probabilities >= p
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -torch.inf)


@torch.inference_mode()
def prefill(
    model: GatedExponentialSmoothingLM, ids: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Read a prompt in windows, in memory that does not grow with its length.

    Args:
        model: the language model.
        ids: `(batch, length)`, at least one token long.
        state: `(depth, batch, dim_mhesa)`, from what was read before; `None` at the start.

    Returns:
        The logits behind the last token, `(batch, num_tokens)`, and the state.
    """
    if ids.shape[1] == 0:
        raise InputError("the prompt must hold at least one token")
    state = model.initial_state(len(ids)) if state is None else state
    for window in ids.split(WINDOW, dim=1):
        hidden, states = run_blocks(model.layers, model.token_emb(window), state, None)
        state = torch.stack(states)
    return model.to_logits(hidden[:, -1]), state


@torch.inference_mode()
def stream(
    model: GatedExponentialSmoothingLM,
    ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    eos_token_id: int | None = None,
) -> Iterator[int]:
    """Continue a prompt, token by token as they are made.

    Args:
        model: the language model.
        ids: the prompt, `(length,)`, at least one token.
        max_new_tokens: how many tokens to make at most.
        sampling: how tokens are drawn; plain sampling if omitted.
        seed: makes the result repeatable; torch's own random state if omitted.
        eos_token_id: the token to stop at; it is not given out.

    >>> model = GatedExponentialSmoothingLM(num_tokens=16, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> len(list(stream(model, torch.tensor([3]), max_new_tokens=5)))
    5
    """
    sampling = sampling or Sampling()
    device = model.to_logits.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    logits, state = prefill(model, ids[None].to(device))
    for _ in range(max_new_tokens):
        token = sampling.draw(logits, generator)
        if token.item() == eos_token_id:
            return
        yield int(token.item())
        logits, state = model.step(token, state)


def until(pieces: Iterable[bytes], ending: bytes) -> Iterator[bytes]:
    """Hand text on as it comes, up to the first `ending` and without it.

    What may be the beginning of the ending is held back until it is clear. An empty ending never comes.

    >>> b"".join(until([b"one ", b"two", b"\\n", b"\\nthree"], b"\\n\\n"))
    b'one two'
    """
    held = b""
    for piece in pieces:
        held += piece
        found = held.find(ending) if ending else -1
        if found >= 0:
            yield held[:found]
            return
        safe = len(held) - _overlap(held, ending)
        yield held[:safe]
        held = held[safe:]
    yield held


def _overlap(text: bytes, ending: bytes) -> int:
    """How many bytes at the end of `text` begin `ending`."""
    longest = min(len(text), len(ending) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(ending[:size])), 0)
