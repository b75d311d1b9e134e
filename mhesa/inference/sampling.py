"""Drawing the next token from logits: settings, a random stream for each sequence, and draws for a batch."""

from __future__ import annotations

import ctypes
import operator
import secrets
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.inference.sampling_settings import Sampling
from mhesa.ops.checks import check_logits, distinct_tokens, is_plain
from mhesa.ops.cpu.arguments import FLOAT64, INT64, STORED, Pointer, Struct, struct
from mhesa.ops.cpu.threads import available, new_lock
from mhesa.ops.cpu.workers import parallel_short
from mhesa.settings import AT_LEAST_0, check_sizes

__all__ = ["BatchSampler", "Sampling", "TokenSampler"]

Note = struct(
    "Note",
    token="int64",
    seen="int64",  # whether the token is in the sequence, for the repetition penalty
    count="int64",  # how often it was drawn
    bias="float64",
)
Sampler = struct(
    "Sampler",
    temperature="float64",
    top_k="int64",
    top_p="float64",
    min_p="float64",
    repetition_penalty="float64",
    frequency_penalty="float64",
    presence_penalty="float64",
    random="uint64",  # the state of the random stream
    notes=Pointer(Note),
    note_count="int64",
)
# Arguments of `mhesa.inference.sampling_kernel.draw`.
Arguments = struct(
    "Arguments",
    next_row="int64",
    next_thread="int64",
    rows="int64",
    num_tokens="int64",
    logits=STORED,
    row_stride="int64",
    samplers=Pointer(Pointer(Sampler)),
    weights=FLOAT64,  # scratch memory, `num_tokens` for each thread
    order=INT64,  # scratch memory, `num_tokens` for each thread
    out=INT64,
)
# The largest vocabulary: ids are int64.
MAX_TOKENS = 1 << 63
# Types of logits that native code reads; others are converted to fp32.
DTYPES = (torch.float32, torch.float64)
# Below this many logits, use one thread.
MIN_PARALLEL = 1 << 12


class TokenSampler:
    """Draws the tokens of one sequence.

    It owns the random stream of the sequence: draws depend on the seed and on the logits of this sequence,
    not on other sequences. It cannot be copied or pickled.

    Args:
        sampling: how tokens are drawn.
        seed: 0 or more, makes draws repeatable. `None` takes a random seed.

    Raises:
        InputError: a negative seed.

    >>> sampler = BatchSampler(3, [TokenSampler(Sampling(temperature=0))])
    >>> sampler.draw(torch.tensor([[0.0, 2.0, 1.0]]))
    [1]
    """

    def __init__(self, sampling: Sampling | None = None, seed: int | None = None) -> None:
        if seed is not None:
            check_sizes(AT_LEAST_0, seed=seed)
        self.sampling = given = sampling or Sampling()
        penalties = (given.repetition_penalty, given.frequency_penalty, given.presence_penalty)
        self.penalises = penalties != (1, 0, 0)
        values = {**vars(given), "top_k": min(given.top_k, MAX_TOKENS - 1)}
        del values["logit_bias"]  # the notes hold it
        random = secrets.randbits(64) if seed is None else int(seed) % (1 << 64)
        self.struct = Sampler(**values, random=random)
        # Notes on tokens, the index of each token's note, and the size of the vocabulary once it is known.
        self._notes, self._indices = (Note * 8)(), dict[int, int]()
        self._num_tokens: int | None = None
        for token, bias in given.logit_bias.items():
            self._note(token).bias = bias

    def __getstate__(self) -> NoReturn:
        raise InputError("a sampler cannot be copied or pickled; make another TokenSampler")

    def observe(self, ids: Tensor | Iterable[int]) -> None:
        """Note the sequence's earlier tokens, integers `(tokens,)`, for the repetition penalty.

        Raises:
            InputError: ids that are no integers, or outside the vocabulary.
        """
        if self.sampling.repetition_penalty != 1:
            for token in distinct_tokens(ids):
                self._note(token).seen = 1

    def count(self, token: int) -> None:
        """Note a token that was drawn; needed if the sampler `penalises`."""
        note = self._note(token)
        note.seen = 1
        note.count += 1

    def check(self, num_tokens: int) -> None:
        """Raise `InputError` if a token noted so far is outside a vocabulary of this size, or a later one."""
        highest = max(self._indices, default=0)
        if highest >= num_tokens:
            raise InputError(f"token ids must be 0 to {num_tokens - 1}, not {highest}")
        self._num_tokens = num_tokens if self._num_tokens is None else min(num_tokens, self._num_tokens)

    def _note(self, token: int) -> Struct:
        token = operator.index(token)
        if not 0 <= token < (self._num_tokens or MAX_TOKENS):
            raise InputError(f"token ids must be 0 to {(self._num_tokens or MAX_TOKENS) - 1}, not {token}")
        index = self._indices.setdefault(token, len(self._indices))
        if index == len(self._notes):
            self._notes = (Note * (2 * index))(*self._notes)
        self._notes[index].token = token
        # Tell native code where the notes are.
        self.struct.notes, self.struct.note_count = ctypes.addressof(self._notes), len(self._indices)
        return self._notes[index]


class BatchSampler:
    """Draws for all rows of a batch at once; rows may be added and removed.

    Python threads may share it: their draws take turns. It cannot be copied or pickled.

    Args:
        num_tokens: the size of the vocabulary.
        samplers: the samplers of the first rows.
        max_rows: the largest number of rows; as many as `samplers` if omitted.

    Raises:
        InputError: an empty vocabulary, more samplers than rows, or one that has noted tokens outside the
            vocabulary.
    """

    def __init__(
        self, num_tokens: int, samplers: Sequence[TokenSampler] = (), max_rows: int | None = None
    ) -> None:
        check_sizes(num_tokens=num_tokens)
        self.num_tokens = num_tokens
        self.rows: list[TokenSampler] = []
        size = len(samplers) if max_rows is None else max_rows
        # The token last drawn for each row: int64 `(max_rows,)`, valid for the rows in use.
        self.last = torch.zeros(size, dtype=torch.int64, device="cpu")
        self._addresses = np.zeros(size, dtype=np.int64)
        self._samplers, self._last = self._addresses.ctypes.data, self.last.numpy()
        self._last_address = self.last.data_ptr()
        threads = max(1, min(size, available()))
        self._scratch = np.empty((2, threads, num_tokens))
        self._args = Arguments(
            num_tokens=num_tokens,
            weights=self._scratch[0].ctypes.data,
            order=self._scratch[1].ctypes.data,
        )
        self._lock = new_lock()
        for sampler in samplers:
            self.append(sampler)

    def __getstate__(self) -> NoReturn:
        raise InputError("samplers cannot be copied or pickled; make another BatchSampler")

    def __len__(self) -> int:
        return len(self.rows)

    def append(self, sampler: TokenSampler) -> None:
        """Add a row after the others.

        Raises:
            InputError: there is no room, or the sampler has noted tokens outside the vocabulary.
        """
        sampler.check(self.num_tokens)
        with self._lock:
            if len(self.rows) == len(self.last):
                raise InputError(f"there is room for {len(self.last)} rows; make max_rows larger for another")
            self._addresses[len(self.rows)] = sampler.struct.address
            self.rows.append(sampler)

    def take_out(self, row: int) -> None:
        """Remove a row; the last one takes its place.

        Raises:
            InputError: there is no such row.
        """
        with self._lock:
            if not 0 <= row < len(self.rows):
                raise InputError(f"there is no row {row} among {len(self.rows)}")
            last = self.rows.pop()
            if row < len(self.rows):
                self.rows[row] = last
                self._addresses[row], self.last[row] = last.struct.address, self.last[len(self.rows)]

    def draw(self, logits: Tensor, first: int = 0) -> list[int]:
        """Draw a token for each of the rows from `first` on.

        Args:
            logits: `(rows, num_tokens)` or wider, on any device; what is beyond `num_tokens` is never drawn.
            first: the row of the first logits.

        Returns:
            A token for each row, also in `last`; -1 for a row whose logits are NaN or infinite.

        Raises:
            InputError: logits of another shape, not of real numbers, or of rows that are not there.
        """
        check_logits(logits, self.num_tokens)
        values = logits
        if not (is_plain(logits) and logits.is_cpu and logits.dtype in DTYPES and logits.stride(1) == 1):
            dtype = logits.dtype if logits.dtype in DTYPES else torch.float32
            values = torch.empty(logits.shape, dtype=dtype, device="cpu").copy_(logits.detach())
        with self._lock:
            return self._draw(values, first)

    def _draw(self, values: Tensor, first: int) -> list[int]:
        args, count = self._args, values.shape[0]
        rows = self.rows[first : first + count]
        if first < 0 or len(rows) < count:
            raise InputError(f"there are {len(self.rows)} rows to draw for, not {count} from {first} on")
        args.next_row = args.next_thread = 0
        args.rows, args.logits, args.row_stride = count, values.data_ptr(), values.stride(0)
        args.samplers, args.out = self._samplers + 8 * first, self._last_address + 8 * first
        parallelise = count * self.num_tokens >= MIN_PARALLEL
        threads = min(count, self._scratch.shape[1], available()) if parallelise else 1
        parallel_short(_native_draw(values.dtype), args.address, threads)
        tokens: list[int] = self._last[first : first + count].tolist()
        for sampler, token in zip(rows, tokens, strict=True):
            if sampler.penalises and token >= 0:
                sampler.count(token)
        return tokens


@cache
def _native_draw(dtype: torch.dtype) -> int:
    # Numba is imported only when a kernel is needed.
    from mhesa.inference import sampling_kernel
    from mhesa.ops.cpu.compiling import compiled

    return compiled(sampling_kernel.draw, dtype, Arguments)
