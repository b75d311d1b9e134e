"""Drawing the next token from logits: settings, a random stream for each sequence, one draw for a batch."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.inference.sampling_settings import Sampling
from mhesa.ops.cpu.threads import available, parallel

__all__ = ["BatchSampler", "Sampling", "TokenSampler", "draw"]

# What the kernel reads of a sampler, eight bytes each: numbers, and from RANDOM on integers.
TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE, RANDOM, TOP_K, NOTES, NOTED = range(10)
RECORD = "6dQ3q"
# What a sampler notes of a token.
TOKEN, SEEN, COUNT, BIAS, NOTE_FIELDS = range(5)


class TokenSampler:
    """Draws the tokens of one sequence.

    It owns the sequence's random stream: what it draws depends on its seed and the logits it has seen, not
    on other sequences.

    Args:
        sampling: how tokens are drawn.
        seed: 0 or more; makes the draws repeatable. `None` draws anew each time.

    Raises:
        InputError: a negative seed.

    >>> draw(torch.tensor([[0.0, 2.0, 1.0]]), [TokenSampler(Sampling(temperature=0))])
    [1]
    """

    def __init__(self, sampling: Sampling | None = None, seed: int | None = None) -> None:
        if seed is not None and seed < 0:
            raise InputError(f"seed must be 0 or more, not {seed}")
        self.sampling = given = sampling or Sampling()
        start = secrets.randbits(64) if seed is None else seed % (1 << 64)
        penalties = (given.repetition_penalty, given.frequency_penalty, given.presence_penalty)
        self.remembers = penalties != (1, 0, 0)
        record = struct.pack(
            RECORD, given.temperature, given.top_p, given.min_p, *penalties, start, given.top_k, 0, 0
        )
        self._record = np.frombuffer(bytearray(record), dtype=np.int64)
        self.address: int = self._record.ctypes.data
        # What is noted of tokens, a row each, and in which row.
        self._notes, self._places = np.zeros((8, NOTE_FIELDS)), dict[int, int]()
        for token, bias in given.logit_bias.items():
            self._note(token)[BIAS] = bias

    def observe(self, ids: Tensor | Iterable[int]) -> None:
        """Take note of tokens that the sequence has, for the repetition penalty."""
        if self.sampling.repetition_penalty != 1:
            for token in ids.unique().tolist() if isinstance(ids, Tensor) else ids:
                self._note(token)[SEEN] = 1

    def drew(self, token: int) -> None:
        """Take note of a token that was drawn, where penalties `remember` it."""
        note = self._note(token)
        note[SEEN] = 1
        note[COUNT] += 1

    def check(self, num_tokens: int) -> None:
        """Raise `InputError` if a token was noted that a vocabulary of this size does not have."""
        highest = max(self._places, default=0)
        if highest >= num_tokens:
            raise InputError(f"token ids must be 0 to {num_tokens - 1}, not {highest}")

    def _note(self, token: int) -> np.ndarray:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._notes):
            self._notes = np.concatenate([self._notes, np.zeros_like(self._notes)])
        self._notes[place, TOKEN] = token
        self._record[NOTES:] = self._notes.ctypes.data, len(self._places)
        return self._notes[place]


class BatchSampler:
    """The samplers of a batch's rows, which come and go, ready to draw for all of them at once.

    What the kernel needs to know lies in arrays that change only when a row does.

    Args:
        num_tokens: the size of the vocabulary.
        samplers: a row's each.
        most: how many rows there may be; no more than these if omitted.

    Raises:
        InputError: a sampler has noted tokens that are not in the vocabulary.
    """

    def __init__(
        self, num_tokens: int, samplers: Sequence[TokenSampler] = (), most: int | None = None
    ) -> None:
        # Numba is loaded when it is needed.
        from mhesa.inference import sampling_kernel
        from mhesa.ops.cpu.simd import compiled

        self._kernel, self._function = sampling_kernel, partial(compiled, sampling_kernel.draw)
        self.num_tokens = num_tokens
        self.rows: list[TokenSampler] = []
        rows = len(samplers) if most is None else most
        # What was drawn for each row last: int64 `(most,)`, of which those in use come first.
        self.last = torch.zeros(rows, dtype=torch.int64)
        threads = max(1, min(rows, available()))
        self._addresses = np.zeros(rows, dtype=np.int64)
        self._samplers, self._last = self._addresses.ctypes.data, self.last.data_ptr()
        self._scratch = np.empty((2, threads, num_tokens))
        self._table = table = np.zeros(sampling_kernel.FIELDS, dtype=np.int64)
        table[sampling_kernel.TOKENS] = num_tokens
        table[sampling_kernel.WEIGHTS] = self._scratch[0].ctypes.data
        table[sampling_kernel.ORDER] = self._scratch[1].ctypes.data
        for sampler in samplers:
            self.append(sampler)

    def __len__(self) -> int:
        return len(self.rows)

    def append(self, sampler: TokenSampler) -> None:
        """Add a row, behind the others."""
        sampler.check(self.num_tokens)
        self._addresses[len(self.rows)] = sampler.address
        self.rows.append(sampler)

    def take_out(self, row: int) -> None:
        """Remove a row; the last one takes its place."""
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last
            self._addresses[row], self.last[row] = last.address, self.last[len(self.rows)]

    def draw(self, logits: Tensor, first: int = 0) -> list[int]:
        """Draw a token for some rows, those from `first` on.

        Args:
            logits: `(rows, num_tokens)`, on any device.

        Returns:
            A token for each row, `last` too; -1 for a row whose logits are not numbers.
        """
        values = logits.detach().cpu()
        if values.dtype not in (torch.float32, torch.float64):
            values = values.float()
        if values.stride(1) != 1:
            values = values.contiguous()
        kernel, table, count = self._kernel, self._table, values.shape[0]
        table[kernel.TASK] = table[kernel.THREAD] = 0
        table[kernel.ROWS], table[kernel.LOGITS] = count, values.data_ptr()
        table[kernel.LOGITS_STEP] = values.stride(0)
        table[kernel.SAMPLERS], table[kernel.OUT] = self._samplers + 8 * first, self._last + 8 * first
        enough = count * self.num_tokens >= kernel.PARALLEL
        threads = min(count, self._scratch.shape[1], available()) if enough else 1
        parallel(self._function(values.dtype), table.ctypes.data, threads)
        tokens: list[int] = self.last[first : first + count].tolist()
        for sampler, token in zip(self.rows[first : first + count], tokens, strict=True):
            if sampler.remembers and token >= 0:
                sampler.drew(token)
        return tokens


def draw(logits: Tensor, samplers: Sequence[TokenSampler]) -> list[int]:
    """Draw one token a sequence, once; who draws again and again keeps `BatchSampler`.

    Args:
        logits: `(batch, num_tokens)`, on any device.
        samplers: one for each row; each moves on by one draw.

    Returns:
        A token for each row; -1 for a row whose logits are not numbers.
    """
    return BatchSampler(logits.shape[1], samplers).draw(logits)
