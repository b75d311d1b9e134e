"""Statistics of predictions, given the token that came: surprisal, entropy, rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import NOT_NUMBERS, InputError
from mhesa.ops.checks import check_targets

if TYPE_CHECKING:
    from mhesa.inference.decoder import Decoder
    from mhesa.inference.parallel_decoder import ParallelDecoder

# Rows whose log-probabilities are computed at once on a CPU: few enough to stay in a core's cache.
ROWS = 256

# Maps log-probabilities `(rows, num_tokens)` in nats and targets `(rows,)` to one value per row.
Statistic = Callable[[Tensor, Tensor], Tensor]


def bits(logprobs: Tensor, targets: Tensor) -> Tensor:
    """Surprisal in bits: `-log2` of the probability of the token that came.

    Args:
        logprobs: `(rows, num_tokens)`, in nats.
        targets: the token that came, `(rows,)`.

    >>> bits(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0])).item()
    2.0
    """
    return logprobs.gather(1, targets[:, None])[:, 0] / -math.log(2)


def entropy(logprobs: Tensor, targets: Tensor) -> Tensor:
    """The surprisal in bits that the model expects; see `bits` for the arguments, `(rows, num_tokens)`.

    >>> entropy(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0])).item()
    1.0
    """
    # No probability of 0 times minus infinity.
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(1) / math.log(2)


def rank(logprobs: Tensor, targets: Tensor) -> Tensor:
    """1 for the likeliest token, and one more for each that is likelier; see `bits`, `(rows, num_tokens)`.

    >>> rank(torch.tensor([[0.1, 0.6, 0.3]]).log(), torch.tensor([2])).item()
    2
    """
    return (logprobs > logprobs.gather(1, targets[:, None])).sum(1) + 1


# What may be computed of each token, by the names of columns, in the order of the native kernel's results.
BITS: Mapping[str, Statistic] = {"bits": bits}
STATISTICS: dict[str, Statistic] = {**BITS, "entropy": entropy, "rank": rank}


def boundary_bits(starts: Tensor) -> Statistic:
    """The surprisal of a word boundary in bits, by the ids of tokens that begin a word, `(starts,)`.

    `mhesa.inference.units` says what it is for.
    """
    return lambda logprobs, targets: logprobs[:, starts].logsumexp(1) / -math.log(2)


def token_statistics(
    logits: Tensor, targets: Tensor, statistics: Mapping[str, Statistic]
) -> dict[str, np.ndarray]:
    """Statistics of predictions: by name fp64 `(tokens,)`.

    Args:
        logits: `(tokens, num_tokens)`.
        targets: the tokens that came, `(tokens,)`.
        statistics: functions by name.

    Raises:
        FloatingPointError: a statistic is NaN, as of logits that are not numbers.
    """
    natively = set(STATISTICS.values()) if logits.is_cpu and logits.dtype == torch.float32 else set()
    if statistics and natively.issuperset(statistics.values()):
        from mhesa.inference.decoder.statistics_kernel import measure

        values = measure(logits, targets, bits_only={bits}.issuperset(statistics.values()))
        measured: dict[Statistic, np.ndarray] = dict(zip(STATISTICS.values(), values, strict=False))
        return {name: check_numbers(measured[statistic]) for name, statistic in statistics.items()}
    # Preallocate: freed large blocks between live small ones would fragment the heap.
    found = {name: np.empty(len(targets)) for name in statistics}
    size = ROWS if logits.is_cpu else max(len(targets), 1)
    for start in range(0, len(targets), size):
        rows = slice(start, start + size)
        logprobs = logits[rows].float().log_softmax(1)
        wanted = targets[rows].to(logprobs.device)
        for name, statistic in statistics.items():
            found[name][rows] = check_numbers(statistic(logprobs, wanted).cpu().numpy())
    return found


def check_numbers(values: np.ndarray) -> np.ndarray:
    """The statistics of some tokens, `(tokens,)`, as they are; raises `FloatingPointError` if one is NaN."""
    if np.isnan(values).any():
        raise FloatingPointError(NOT_NUMBERS)
    return values


def read_tokens(
    decoder: Decoder | ParallelDecoder,
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor,
    state: Tensor,
    statistics: Mapping[str, Statistic],
) -> dict[str, np.ndarray]:
    """Read texts, and compute statistics of the predictions of the tokens that came.

    Args:
        decoder: the model; in several processes it measures `bits` alone.
        inputs: ids of one text `(length,)`, or of each of several.
        targets: the token that came after each, one text after the other, `(tokens,)`.
        state: `(depth, texts, state_size)`, changed in place.
        statistics: functions by name.

    Returns:
        By name fp64 `(tokens,)`.

    Raises:
        InputError: not as many targets as inputs, other statistics than bits are asked of several processes,
            or what `Decoder.read` raises.
        IndexError: an id or a target outside the vocabulary.
        FloatingPointError: logits are not numbers.
    """
    from mhesa.inference.decoder import Decoder

    read = len(inputs) if isinstance(inputs, Tensor) else sum(map(len, inputs))
    if read == len(targets) == 0:
        # The tokenizer makes no tokens of the text.
        return {name: np.zeros(0) for name in statistics}
    if set(statistics.values()) == {bits}:
        # Several processes read one text alone.
        measured: Callable[..., np.ndarray] = decoder.surprisal
        return dict.fromkeys(statistics, measured(inputs, targets, state))
    if not isinstance(decoder, Decoder):
        raise InputError("several processes can measure bits alone; start one process for anything else")
    targets = check_targets(targets, read, decoder.num_tokens)
    # Preallocate: freed large blocks between live small ones would fragment the heap.
    found = {name: np.empty(len(targets)) for name in statistics}

    def measure(logits: Tensor, start: int) -> None:
        rows = slice(start, start + len(logits))
        for name, values in token_statistics(logits, targets[rows], statistics).items():
            found[name][rows] = values

    decoder.read(inputs, state, measure)
    return found
