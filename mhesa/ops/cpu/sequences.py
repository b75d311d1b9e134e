"""What both scans on CPU share: where sequences lie, how they are cut, and the arguments of their kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mhesa.errors import InputError
from mhesa.ops.backends import Inputs
from mhesa.ops.cpu.arguments import ACCUMULATION, INT64, STORED, Pointer, Struct, struct
from mhesa.ops.cpu.memory import CPU
from mhesa.ops.cpu.threads import available

# A block of channels has at least this many: shorter pieces of rows are read slowly.
MIN_BLOCK = 32
# Below this many elements, use one thread: waking a second takes longer than the scan.
MIN_PARALLEL = 1 << 14
# Above this many bytes read and written, use non-temporal stores: lines that are about to be overwritten are
# not read first. Operators that read the result next were never slower for it.
NONTEMPORAL_BYTES = 1 << 23
# Threads that a relay keeps busy: moving the state, which one thread does at a time, is a third of the work.
RELAY_THREADS = 3

Integers = npt.NDArray[np.int64]
Structs = npt.NDArray[np.void]

Chunk = struct(
    "Chunk",
    sequence="int64",
    batch="int64",  # where its rows are: index in the batch,
    begin="int64",  # first row,
    end="int64",  # and the row after its last
    earlier="int64",  # chunks of its sequence before it in the direction of the scan,
    later="int64",  # and after it
    slot="int64",  # at fixed rates, the first of its carries, one a span; -1: it is not cut into spans
    first="int64",  # for the convolution, the first row of its sequence,
    last="int64",  # and the row after its last
)
# What the kernels of both scans are given.
ARGUMENTS: dict[str, str | Pointer] = {
    "next_task": "int64",
    "blocks": "int64",  # blocks of channels that tasks are cut into
    "chunks": Pointer(Chunk),
    "turns": INT64,  # in a relay, finished chunks of each sequence and block, `LINE` apart
    "x": STORED,
    "x_batch": "int64",  # strides, in elements
    "x_row": "int64",
    "x_head": "int64",
    "dy": STORED,
    "dy_batch": "int64",
    "dy_row": "int64",
    "dy_head": "int64",
    "out": STORED,  # y, or dx
    "alpha": ACCUMULATION,
    "decay": ACCUMULATION,
    "skip": ACCUMULATION,
    "initial": ACCUMULATION,
    "final": ACCUMULATION,
    "dfinal": ACCUMULATION,
    "dinitial": ACCUMULATION,
    "dalpha": ACCUMULATION,
    "ddecay": ACCUMULATION,
    "dskip": ACCUMULATION,
    "length": "int64",
    "heads": "int64",
    "head_dim": "int64",
    "reverse": "int64",
    "nontemporal": "int64",  # whether results are stored past the caches
}


class Sequences:
    """Where each sequence lies: its index in the batch, its first row, and the row after its last."""

    def __init__(self, batch: Integers, begin: Integers, end: Integers) -> None:
        self.batch, self.begin, self.end = batch, begin, end
        self._cuts: dict[tuple[Any, ...], Any] = {}

    def cut(self, cutter: Callable[..., Any], *options: object) -> Any:
        """The result of `cutter(self, *options)`, computed once."""
        if (cutter, options) not in self._cuts:
            self._cuts[cutter, options] = cutter(self, *options)
        return self._cuts[cutter, options]


def find_sequences(batch: int, length: int, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of a batch, or of one packed row with offsets `cu_seqlens`, `(sequences + 1,)`."""
    if cu_seqlens is None:
        return _dense(batch, length)
    return _packed(cu_seqlens.to(torch.int64).numpy().tobytes(), length)


@lru_cache(maxsize=64)
def _dense(batch: int, length: int) -> Sequences:
    sequences = np.arange(batch)
    return Sequences(sequences, np.zeros_like(sequences), np.full_like(sequences, length))


# All layers of a model are given the same offsets, forward and backward.
@lru_cache(maxsize=1)
def _packed(cu_seqlens: bytes, length: int) -> Sequences:
    """Sequences by their offsets, which address memory and which compiled graphs have not checked."""
    offsets = np.frombuffer(cu_seqlens, dtype=np.int64)
    if offsets[0] != 0 or offsets[-1] != length or (offsets[1:] < offsets[:-1]).any():
        raise InputError(f"cu_seqlens must rise from 0 to the length {length}")
    return Sequences(np.zeros(len(offsets) - 1, dtype=np.int64), offsets[:-1], offsets[1:])


def number_pieces(counts: Integers) -> tuple[Integers, Integers]:
    """The sequence of each piece, in order, and its index within the sequence, which has `counts` pieces."""
    sequence = np.repeat(np.arange(len(counts)), counts)
    return sequence, np.arange(len(sequence)) - np.repeat(counts.cumsum() - counts, counts)


def cut_rows(sequences: Sequences, rows: int, reverse: bool) -> Structs:
    """Cut sequences into chunks of `rows` rows, the first of each where the scan begins."""
    pieces = np.maximum(-(-(sequences.end - sequences.begin) // rows), 1)
    sequence, piece = number_pieces(pieces)
    begin, end = sequences.begin[sequence], sequences.end[sequence]
    return chunk_structs(
        sequence=sequence,
        batch=sequences.batch[sequence],
        begin=np.maximum(end - (piece + 1) * rows, begin) if reverse else begin + piece * rows,
        end=end - piece * rows if reverse else np.minimum(begin + (piece + 1) * rows, end),
        earlier=piece,
        later=pieces[sequence] - 1 - piece,
        first=begin,
        last=end,
    )


def chunk_structs(**fields: Integers) -> Structs:
    """`Chunk` structs with these fields."""
    table = np.zeros(len(fields["sequence"]), dtype=Chunk)
    for name, values in fields.items():
        table[name] = values
    return table


def relay_order(chunks: Structs) -> Integers:
    """The first chunk of every sequence, then the second of every sequence, and so on."""
    return np.lexsort((chunks["sequence"], chunks["earlier"]))


class Call:
    """The arguments of the kernels for one scan, and the tensors that have to live until it is done.

    Args:
        arguments: the declaration of the kernels' arguments; those that all scans have are filled in.
        inputs: inputs of the scan.
        reverse: whether the kernels begin with the last row.
    """

    def __init__(self, arguments: type[Struct], inputs: Inputs, reverse: bool) -> None:
        x = inputs.x
        batch, length, self.heads, self.head_dim = x.shape
        self.channels, self.bytes, self.stored = self.heads * self.head_dim, x.nbytes, x.dtype
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.threads = 1 if x.numel() < MIN_PARALLEL else available()
        self.sequences = find_sequences(batch, length, inputs.cu_seqlens)
        self.state_shape = (len(self.sequences.batch), self.heads, self.head_dim)
        self.kept: list[Tensor] = []
        self.args: Any = arguments(
            length=length,
            heads=self.heads,
            head_dim=self.head_dim,
            reverse=reverse,
            skip=self.parameter(inputs.skip),
        )

    def shares_sequences(self) -> bool:
        """Whether every thread gets as many whole sequences, or nearly: otherwise they work in a relay."""
        sequences = self.state_shape[0]
        return sequences % self.threads == 0 or sequences >= 4 * self.threads

    def new(self, *shape: int) -> Tensor:
        """Memory of any shape for values of the accumulation type."""
        return torch.empty(shape, dtype=self.dtype, device=CPU)

    def keep(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor of any shape, which is kept."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def parameter(self, tensor: Tensor | None) -> int:
        """The address of a tensor of any shape in the accumulation type, 0 for none."""
        if tensor is None:
            return 0
        if tensor.dtype != self.dtype or not tensor.is_contiguous():
            tensor = tensor.to(self.dtype).contiguous()
        return self.keep(tensor)

    def rows(self, tensor: Tensor, *, min_head_dim: float) -> tuple[int, int, int, int]:
        """The address of a `(batch, length, heads, head_dim)` tensor, and its first three strides.

        Heads of fewer than `min_head_dim` channels lie one after another.
        """
        if tensor.dtype != self.stored:
            tensor = tensor.to(self.stored)
        tensor = readable(tensor, min_head_dim=min_head_dim)
        by_batch, by_row, by_head, _ = tensor.stride()
        return self.keep(tensor), by_batch, by_row, by_head if self.heads > 1 else self.head_dim


def readable(tensor: Tensor, *, min_head_dim: float) -> Tensor:
    """A `(batch, length, heads, head_dim)` tensor whose heads are contiguous: itself or a copy.

    Broadcast dimensions stay so. Heads of fewer than `min_head_dim` channels must also lie one after another.
    """
    heads, head_dim = tensor.shape[2:]
    by_batch, by_row, by_head, by_channel = tensor.stride()
    contiguous_heads = heads == 1 or by_head == head_dim
    if tensor.numel() == 0:
        return tensor
    if (head_dim == 1 or by_channel == 1) and (contiguous_heads or head_dim >= min_head_dim):
        return tensor
    # The gradient of a sum is one number, broadcast.
    narrow = tensor[: 1 if by_batch == 0 else None, : 1 if by_row == 0 else None]
    return narrow.contiguous().expand(tensor.shape)
