"""`Decoder`: reads tokens into a state and predicts the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NoReturn, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from mhesa.errors import InputError
from mhesa.inference.statistics import check_numbers
from mhesa.model.layers import GatedMHESA
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.checks import check_ids, check_sequences, check_state, check_targets, check_weights
from mhesa.ops.cpu.threads import new_lock
from mhesa.settings import AT_LEAST_0, check_sizes

# Values from which torch copies on all its threads (at::internal::GRAIN_SIZE).
TORCH_PARALLEL = 1 << 15


class Engine(Protocol):
    """Runs the model over some rows: at most `rows` at a time if all logits are wanted, else `long_rows`."""

    rows: int
    long_rows: int

    def run(self, ids: Tensor, offsets: Tensor, state: Tensor, all_logits: bool) -> Tensor:
        """Read rows of some sequences.

        Args:
            ids: tokens of all sequences, one sequence after the other, int64 `(rows,)`.
            offsets: where each sequence starts and the last ends, int64 `(sequences + 1,)`.
            state: `(depth, sequences, state_size)`, changed in place.
            all_logits: return logits of every row, not only of each sequence's last.

        Returns:
            Logits in the type of the state, `(rows or sequences, num_tokens)`; the next call may overwrite
            them.
        """

    def surprisal(self, ids: Tensor, offsets: Tensor, state: Tensor, targets: Tensor) -> np.ndarray:
        """Read rows as `run` does, and find the surprisal of the token after each, `targets`.

        Returns:
            In bits, fp64 `(rows,)`.
        """


class Decoder:
    """A model prepared for inference.

    On CPU one native function runs all layers and reads each weight once: fp32 and bf16 weights as the
    model has them, or int8 by `quantize`. A sequence's results are the same bit for bit whether it is read
    in one stretch or token by token, alone or in a batch. On other devices, for other types, and where the
    model names another backend than `numba`, its own layers run (on CUDA a step is one CUDA graph).

    That native function has a copy of the weights and does not see later changes of the model. Python
    threads may share a decoder: their calls take turns, each on all cores. It cannot be copied or pickled.

    Args:
        model: the language model.
        max_batch: the largest number of sequences in a call.
        quantize: `"int8"` stores matrices in 8 bits with a scale for each output, a quarter of the memory
            of fp32, and rounds what they are multiplied with to 8 bits too, with a scale for each row; on CPU
            only. `None` keeps them as they are.
        single_thread_small_calls: run small calls on one thread. They take slightly longer, but leave other
            cores free, such as for a server's HTTP loop. Results are the same.

    Raises:
        InputError: an unknown quantisation, or one that this device or type does not have, or that a matrix
            of the model is too wide for; or the model is on the meta device.

    >>> model = GatedExponentialSmoothingLM(num_tokens=16, dim=8, depth=2, heads=1, dim_mhesa=4)
    >>> decoder, state = Decoder(model), model.initial_state(1)
    >>> decoder.prefill(torch.tensor([[3, 1, 4]]), state).shape
    torch.Size([1, 16])
    >>> decoder.step(torch.tensor([1]), state).argmax().item() < 16
    True
    """

    def __init__(
        self,
        model: GatedExponentialSmoothingLM,
        *,
        max_batch: int = 1,
        quantize: str | None = None,
        single_thread_small_calls: bool = False,
    ) -> None:
        check_sizes(max_batch=max_batch)
        check_weights(model.parameters())
        weight = model.to_logits.weight
        self.device, self.max_batch = weight.device, max_batch
        self.num_tokens = model.token_emb.num_embeddings
        template = model.initial_state(1)
        self._state_type, self._depth, self._width = template.dtype, template.shape[0], template.shape[2]
        self._engine = _engine(model, quantize, max_batch, single_thread_small_calls)
        self._lock = new_lock()
        # The offsets of a step: one row for each sequence.
        self._step_offsets = torch.arange(max_batch + 1, device="cpu")

    def __getstate__(self) -> NoReturn:
        raise InputError("a decoder cannot be copied or pickled; make another with Decoder(model)")

    def initial_state(self, batch: int) -> Tensor:
        """The state before any token, `(depth, batch, state_size)` of zeros.

        Raises:
            InputError: a negative batch.
        """
        check_sizes(AT_LEAST_0, batch=batch)
        return torch.zeros(self._depth, batch, self._width, dtype=self._state_type, device=self.device)

    def step(self, ids: Tensor, state: Tensor) -> Tensor:
        """Read one token of each sequence.

        Args:
            ids: int64, `(batch,)`.
            state: `(depth, batch, state_size)`, changed in place; it may be a slice of a larger tensor.

        Returns:
            Logits of the next token in the type of the state, `(batch, num_tokens)`.

        Raises:
            InputError: ids or a state that do not fit the model or one another, or more sequences than
                `max_batch`.
            IndexError: an id outside the vocabulary; the state is unchanged.
        """
        check_ids(ids, self.device)
        batch = ids.shape[0]
        self._check(state, batch)
        with self._lock:
            return _copy(self._engine.run(ids, self._step_offsets[: batch + 1], state, False))

    def prefill(self, ids: Tensor | Sequence[Tensor], state: Tensor) -> Tensor:
        """Read many tokens of each sequence, in memory that does not grow with their number.

        Args:
            ids: int64 `(batch, length)`, or one tensor `(length,)` for each sequence; none empty.
            state: as `step` takes it.

        Returns:
            Logits of the token after the last in the type of the state, `(batch, num_tokens)`.

        Raises:
            InputError: as `step` does, or a sequence is empty.
            IndexError: an id outside the vocabulary.
        """
        sequences = check_sequences(ids, self.device)
        self._check(state, len(sequences))
        out = torch.empty(len(sequences), self.num_tokens, dtype=self._state_type, device=self.device)
        with self._lock:
            for first, last, pieces in split_into_calls(sequences, self._engine.long_rows):
                _copy(self._engine.run(*_joined(pieces), state[:, first:last], False), out[first:last])
        return out

    def predict(self, ids: Tensor | Sequence[Tensor], state: Tensor) -> Tensor:
        """Read many tokens of each sequence and predict the token after each.

        Args:
            ids: int64 `(length,)` of one sequence, or one such tensor for each; none empty.
            state: `(depth, sequences, state_size)`, changed in place.

        Returns:
            Logits in the type of the state, `(tokens, num_tokens)`, one sequence after the other.

        Raises:
            InputError: as `prefill` does.
            IndexError: an id outside the vocabulary.
        """
        sequences = check_sequences([ids] if isinstance(ids, Tensor) else ids, self.device)
        tokens = sum(len(sequence) for sequence in sequences)
        out = torch.empty(tokens, self.num_tokens, dtype=self._state_type, device=self.device)
        self.read(sequences, state, lambda logits, start: _copy(logits, out[start : start + len(logits)]))
        return out

    def read(
        self, ids: Tensor | Sequence[Tensor], state: Tensor, take: Callable[[Tensor, int], object]
    ) -> None:
        """As `predict`, but hands out the logits some rows at a time, in memory that does not grow.

        Args:
            ids: as `predict` takes them.
            state: state of the sequences, `(depth, sequences, state_size)`, changed in place.
            take: called with logits in the type of the state, `(some tokens, num_tokens)`, and how many
                tokens came before them. The logits are overwritten when it returns. It must not call the
                decoder, and other threads that do wait for it.
        """
        sequences = check_sequences([ids] if isinstance(ids, Tensor) else ids, self.device)
        self._check(state, len(sequences))
        done = 0
        with self._lock:
            for first, last, pieces in split_into_calls(sequences, self._engine.rows):
                logits = self._engine.run(*_joined(pieces), state[:, first:last], True)
                take(logits, done)
                done += len(logits)

    def surprisal(self, ids: Tensor | Sequence[Tensor], targets: Tensor, state: Tensor) -> np.ndarray:
        """Read many tokens of each sequence and find how surprising the token after each is.

        Logits are not kept, which makes this faster than `predict` and `read`.

        Args:
            ids: as `predict` takes them.
            targets: the token that came after each, one sequence after the other, `(tokens,)`.
            state: as `predict` takes it.

        Returns:
            Surprisal in bits, `-log2` of the probability of the token that came, fp64 `(tokens,)`.

        Raises:
            InputError: as `prefill` does, or there are not as many targets as tokens.
            IndexError: an id or a target outside the vocabulary; for a target the state is unchanged.
            FloatingPointError: logits are not numbers.
        """
        sequences = check_sequences([ids] if isinstance(ids, Tensor) else ids, self.device)
        self._check(state, len(sequences))
        targets = check_targets(targets, sum(map(len, sequences)), self.num_tokens)
        found, done = np.empty(len(targets)), 0
        with self._lock:
            for first, last, pieces in split_into_calls(sequences, self._engine.long_rows):
                rows = slice(done, done + sum(map(len, pieces)))
                found[rows] = self._engine.surprisal(*_joined(pieces), state[:, first:last], targets[rows])
                done = rows.stop
        return check_numbers(found)

    def _check(self, state: Tensor, batch: int) -> None:
        check_state(state, (self._depth, batch, self._width), self._state_type, self.device)
        if not 1 <= batch <= self.max_batch:
            raise InputError(f"the decoder takes 1 to {self.max_batch} sequences, not {batch}")


def _engine(
    model: GatedExponentialSmoothingLM,
    quantize: str | None,
    max_batch: int,
    single_thread_small_calls: bool,
) -> Engine:
    if quantize not in (None, "int8"):
        raise InputError(f"quantize must be int8, not {quantize}")
    weight = model.to_logits.weight
    backend = cast(GatedMHESA, model.layers[0]).mhesa.backend
    # Other libraries' are of other types: quantised, or spread over processes.
    kinds = {type(parameter) for parameter in model.parameters()}
    native = (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and backend in (None, "numba")
        and kinds == {Parameter}
    )
    if quantize and not native:
        found = [f"{weight.dtype} on {weight.device}", *(kind.__name__ for kind in kinds - {Parameter})]
        found += [f"backend {backend}"] if backend not in (None, "numba") else []
        raise InputError(
            f"{quantize} weights need a model in fp32 or bf16 on cpu, without another backend; "
            f"this one is {', '.join(found)}"
        )
    if native:
        from mhesa.inference.decoder.native import NativeEngine

        stored = torch.int8 if quantize else weight.dtype
        return NativeEngine(model, stored, max_batch, single_thread_small_calls)
    from mhesa.inference.decoder.layers import GraphEngine, LayersEngine

    return (GraphEngine if weight.device.type == "cuda" else LayersEngine)(model)


def _copy(logits: Tensor, out: Tensor | None = None) -> Tensor:
    """Copy logits, to `out` if given. On CPU with one thread: torch's others would delay the next call."""
    if not logits.is_cpu or logits.numel() < TORCH_PARALLEL:
        return logits.clone() if out is None else out.copy_(logits)
    if out is None:
        return torch.from_numpy(logits.numpy().copy())
    out.numpy()[...] = logits.numpy()
    return out


def _joined(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences one after the other, and where each starts and the last ends."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces), _offsets(*map(len, pieces))


# Long texts are read in calls of one length.
@lru_cache(maxsize=64)
def _offsets(*lengths: int) -> Tensor:
    """Where sequences of these lengths start and the last ends, int64 `(sequences + 1,)`; to be read only."""
    return torch.tensor([0, *accumulate(lengths)], device="cpu")


def split_into_calls(sequences: list[Tensor], rows: int) -> list[tuple[int, int, list[Tensor]]]:
    """Split sequences, int64 `(length,)` each and none empty, into calls of at most `rows` tokens.

    Returns:
        For each call the first sequence, the one after the last, and their pieces.

    >>> parts = split_into_calls([torch.zeros(20)] * 2, 30)
    >>> [(first, last, [len(piece) for piece in pieces]) for first, last, pieces in parts]
    [(0, 2, [20, 10]), (1, 2, [10])]
    """
    calls: list[tuple[int, int, list[Tensor]]] = []
    pieces: list[Tensor] = []
    first, room = 0, rows
    for index, sequence in enumerate(sequences):
        start, length = 0, len(sequence)
        if length == 0:
            raise InputError("a sequence to read must hold at least one token")
        while start < length:
            if not pieces:
                first, room = index, rows
            count = min(room, length - start)
            pieces.append(sequence[start : start + count])
            start, room = start + count, room - count
            if room == 0:
                calls.append((first, index + 1, pieces))
                pieces = []
    return [*calls, (first, len(sequences), pieces)] if pieces else calls
