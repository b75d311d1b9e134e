"""A session: a model's state in the middle of a text, small enough to copy and to save."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mhesa.atomic_io import check_file, sha256, write_file
from mhesa.errors import InputError, os_errors
from mhesa.inference.continuation import Continuation, TextCursor
from mhesa.inference.decoder import Decoder
from mhesa.inference.generation import write
from mhesa.inference.sampling import Sampling, TokenSampler
from mhesa.locks import only_writer_of_file
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.ops.checks import check_ids
from mhesa.tokenizers.base import Tokenizer
from mhesa.tokenizers.stream import encode_stream

T = TypeVar("T")
FORMAT = "mhesa session 1"
# Bytes of a text that are tokenised at once.
PIECE_BYTES = 1 << 20
# Sequences that are read together: as many as fill the rows of a call, if each has one.
MAX_BATCH = 256


class Reader:
    """A model and its tokenizer, ready to read and write; any number of sessions can share it.

    Args:
        model: the language model, in evaluation mode.
        tokenizer: turns text into its ids and back.
        quantize: how weights are stored, see `Decoder`.
    """

    def __init__(
        self, model: GatedExponentialSmoothingLM, tokenizer: Tokenizer, *, quantize: str | None = None
    ) -> None:
        if len(tokenizer) > model.token_emb.num_embeddings:
            tokens = f"{len(tokenizer):,} tokens and the model {model.token_emb.num_embeddings:,}"
            raise InputError(f"the tokenizer does not fit the model: it has {tokens}")
        self.model, self.tokenizer = model, tokenizer
        self.decoder = Decoder(model, quantize=quantize, max_batch=MAX_BATCH)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every token; see the function `token_bytes`."""
        return token_bytes(self.tokenizer, self.decoder.num_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """See the function `fingerprint`."""
        return fingerprint(self.model)


def token_bytes(tokenizer: Tokenizer, count: int) -> list[bytes]:
    """The bytes of the first `count` tokens, none for an id that the tokenizer lacks."""
    pieces = tokenizer.pieces()
    return [pieces.get(token, b"") for token in range(count)]


@dataclass
class SessionState:
    """All that a session remembers.

    Args:
        state: `(depth, 1, state_size)`, after all tokens but the last.
        token: the last token, which the model has not read yet.
        position: how many tokens the text has.
    """

    state: Tensor
    token: int
    position: int


class Session:
    """Reads, writes and scores one text, piece by piece.

    It keeps one tensor and one token: a few kilobytes, however long the text is.

    Args:
        reader: the model and its tokenizer.

    >>> from mhesa.tokenizers import Bytes
    >>> model = GatedExponentialSmoothingLM(num_tokens=257, dim=8, depth=1, heads=1, dim_mhesa=4)
    >>> session = Session(Reader(model, Bytes()))
    >>> session.feed("Once upon a time")
    >>> other = session.fork()
    >>> text, again = session.generate(max_new_tokens=9, seed=1), other.generate(max_new_tokens=9, seed=1)
    >>> text == again, session.position == other.position > 16
    (True, True)
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        # Every text follows an end-of-text token.
        self._memory = SessionState(reader.decoder.initial_state(1), reader.tokenizer.eos_token_id, 0)
        # The content of files when this session last read or wrote them, as SHA-256; `None`: not there.
        self._seen: dict[str, str | None] = {}

    def __getstate__(self) -> NoReturn:
        raise InputError("a session cannot be copied or pickled; use fork() or save()")

    @property
    def position(self) -> int:
        """How many tokens the text has so far."""
        return self._memory.position

    def feed(self, text: str | bytes | Iterable[bytes]) -> None:
        """Read some text, or its parts as they come: all of it or, on an error, nothing.

        Memory does not grow with its length.
        """
        self._read(self._pieces(text), self._prefill)

    def feed_ids(self, ids: Tensor) -> None:
        """Read some tokens, int64 `(tokens,)`.

        Raises:
            InputError: ids of another type or shape.
            IndexError: an id outside the vocabulary; nothing is read.
        """
        self._read([ids], self._prefill)

    def score(self, text: str | bytes) -> np.ndarray:
        """Read some text and measure the surprisal of each of its tokens.

        Returns:
            Bits for each token, fp64 `(tokens,)`: `-log2` of the probability the model gave it.
        """
        return np.concatenate([np.zeros(0), *self._read(self._pieces(text), self.reader.decoder.surprisal)])

    def score_ids(self, ids: Tensor) -> np.ndarray:
        """Read tokens, int64 `(tokens,)`, and measure the surprisal of each; see `score` and `feed_ids`."""
        return np.concatenate([np.zeros(0), *self._read([ids], self.reader.decoder.surprisal)])

    def generate(
        self,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> str:
        """Continue the text; see `stream`."""
        return "".join(self.stream(max_new_tokens=max_new_tokens, sampling=sampling, seed=seed, stop=stop))

    def stream(
        self,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Iterator[str]:
        """Continue the text, and give it as it is written, in whole characters.

        The session then stands after the new text, and after the stop string or end-of-text token that ended
        it, which is not part of the result. A repetition penalty sees only the tokens of this continuation:
        a session does not remember earlier ones. Where the text is not written to its end, the session stands
        after the tokens drawn, which may be more than was given out: part of a character or of a stop string.

        Args:
            max_new_tokens: largest number of tokens to write; an end-of-text token ends the text too.
            sampling: how tokens are drawn; plain sampling if omitted.
            seed: makes the text repeatable.
            stop: one string or several; the text ends before the first that occurs.

        Raises:
            InputError: the session read something else before the text was at its end.
        """
        tokenizer, begun = self.reader.tokenizer, self._memory
        stops = [stop] if isinstance(stop, str) else stop
        memory = self._memory = replace(begun, state=begun.state.clone())
        text = Continuation(
            TokenSampler(sampling, seed),
            max_new_tokens,
            end=tokenizer.eos_token_id,
            decode=lambda token: tokenizer.decode_bytes([token]),
            stops=[one.encode("utf-8", "surrogateescape") for one in stops],
        )
        cursor, drawn = TextCursor(text), list[int]()
        last = torch.tensor([begun.token], device="cpu")
        try:
            for _, token in write(
                self.reader.decoder, [last], [text], memory.state, num_tokens=len(self.reader.tokenizer)
            ):
                if memory is not self._memory:
                    raise InputError("the session has read something else: end its text before, or fork it")
                drawn.append(token)
                memory.token = token
                memory.position += 1
                if new := cursor.read()[0]:
                    yield new
        except GeneratorExit:
            raise
        except BaseException:
            # An interrupted step leaves a state half changed: read the tokens drawn again.
            if memory is self._memory:
                self._memory = begun
                self.feed_ids(torch.tensor(drawn, dtype=torch.int64, device=self.reader.decoder.device))
            raise

    def fork(self) -> Session:
        """A copy of the session; the two go on independently."""
        other = Session(self.reader)
        other._memory = replace(self._memory, state=self._memory.state.clone())
        other._seen = dict(self._seen)
        return other

    def save(self, path: str | Path) -> None:
        """Write the session to a safetensors file, whole or not at all.

        Raises:
            InputError: the file cannot be written; or somebody else is writing it, or has written it since
                this session read or wrote it.
        """
        with only_writer_of_file(Path(path)):
            self._write(Path(path))

    def _write(self, path: Path) -> None:
        memory, name = self._memory, os.path.realpath(path)
        if name in self._seen and self._seen[name] != _digest(path):
            raise InputError(f"{path} has changed since it was read; load it again, or save to another file")
        state = memory.state[:, 0].cpu().contiguous()
        details = {
            "format": FORMAT,
            "fingerprint": self.reader.fingerprint,
            "token": str(memory.token),
            "position": str(memory.position),
        }
        data = save({"state": state}, metadata=details | {"sha256": _checksum(state, details)})
        with os_errors(f"cannot write {path}"), write_file(path) as file:
            file.write(data)
        self._seen[name] = hashlib.sha256(data).hexdigest()

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, reader: Reader) -> Iterator[Session]:
        """A context with the saved session, or a new one if there is no file; saves it at the end.

        So it does after an exception, as far as the session has come, unless the model gave no numbers.
        Nobody else can open or save the file in the meantime.

        Raises:
            InputError: as `load` and `save` do.
        """
        path = Path(path)
        with only_writer_of_file(path):
            if path.exists():
                session = cls.load(path, reader)
            else:
                session = cls(reader)
                session._seen[os.path.realpath(path)] = None
            try:
                yield session
            except FloatingPointError:
                # The state may hold no numbers, and could not be loaded again.
                raise
            except BaseException:
                session._write(path)
                raise
            session._write(path)

    @classmethod
    def load(cls, path: str | Path, reader: Reader) -> Session:
        """Continue a session that `save` wrote, with the model that it was saved with.

        Raises:
            InputError: the file is missing, damaged, no session, or another model's.
        """
        session = cls(reader)
        # The digest first: if the file changes before it is read, `save` will refuse to replace it.
        digest = _digest(Path(path))
        if digest is None:
            raise InputError(f"there is no saved session {path}")
        session._seen[os.path.realpath(path)] = digest
        state, details = _read(Path(path))
        if details.get("format") != FORMAT:
            raise InputError(f"{path} is no saved session")
        # Sessions of earlier versions have none.
        if details.get("sha256") not in (None, _checksum(state, details)):
            raise InputError(f"{path} is damaged: its contents are not those that were saved")
        if details.get("fingerprint") != reader.fingerprint:
            raise InputError(f"{path} is a session with another model; load the one it was saved with")
        try:
            token, position = int(details["token"]), int(details["position"])
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is damaged: token or position is missing") from error
        mine = session._memory.state[:, 0]
        if state.is_floating_point() and state.dtype != mine.dtype:
            raise InputError(f"{path} is a session in {state.dtype}; this model's are in {mine.dtype}")
        whole = state.shape == mine.shape and state.dtype == mine.dtype and state.isfinite().all()
        if not whole or not 0 <= token < reader.decoder.num_tokens or position < 0:
            raise InputError(f"{path} is damaged: its contents do not fit the model")
        mine.copy_(state)
        session._memory.token, session._memory.position = token, position
        return session

    def _pieces(self, text: str | bytes | Iterable[bytes]) -> Iterator[Tensor]:
        """The tokens of a text, int64 `(tokens,)`, some of a long one at a time."""
        tokenizer = self.reader.tokenizer
        text = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
        if isinstance(text, (bytes, bytearray, memoryview)):
            if len(text) <= PIECE_BYTES:
                return iter([torch.from_numpy(tokenizer.encode_bytes(bytes(text)).astype("int64"))])
            parts: Iterable[bytes] = (
                bytes(text[start : start + PIECE_BYTES]) for start in range(0, len(text), PIECE_BYTES)
            )
        else:
            parts = text
        together = encode_stream(tokenizer, self.reader.token_bytes, parts)
        found = (np.concatenate([block.ids for block in blocks]) for blocks in together)
        return (torch.from_numpy(ids.astype("int64")) for ids in found)

    def _read(self, pieces: Iterable[Tensor], read: Callable[[Tensor, Tensor, Tensor], T]) -> list[T]:
        """Read tokens, int64 `(tokens,)` a piece; the session moves on when all of them are read.

        `read` gets the tokens to read, those that they predict, and the state, to be changed in place.
        """
        decoder, found = self.reader.decoder, []
        memory = replace(self._memory, state=self._memory.state.clone())
        for ids in pieces:
            # All, because the last one is read by the next call.
            check_ids(ids, decoder.device, decoder.num_tokens)
            if len(ids):
                found.append(read(torch.cat([ids.new_tensor([memory.token]), ids[:-1]]), ids, memory.state))
                memory.token, memory.position = int(ids[-1]), memory.position + len(ids)
        self._memory = memory
        return found

    def _prefill(self, inputs: Tensor, ids: Tensor, state: Tensor) -> None:
        self.reader.decoder.prefill(inputs[None], state)


def fingerprint(model: GatedExponentialSmoothingLM) -> str:
    """Identifies a model by its weights: SHA-256 of their names, shapes and bf16 values.

    It is the same in fp32 and in bf16, because a state of the one can be used with the other.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, list(weight.shape)]).encode())
        digest.update(weight.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    """The SHA-256 of a saved session, `None` if there is none."""
    check_file(path)
    with os_errors(f"cannot read {path}"), suppress(FileNotFoundError):
        return sha256(path)
    return None


def _checksum(state: Tensor, details: Mapping[str, str]) -> str:
    """The SHA-256 of a state of any shape on CPU, and what goes with it."""
    names = ("fingerprint", "token", "position")
    digest = hashlib.sha256(json.dumps([details.get(name) for name in names]).encode())
    digest.update(state.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[Tensor, dict[str, str]]:
    """The state in a saved session, empty if there is none, and the metadata."""
    try:
        with os_errors(f"cannot read {path}"), safe_open(path, framework="pt") as file:
            state = file.get_tensor("state") if "state" in file.keys() else torch.empty(0)  # noqa: SIM118
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{path} is damaged, or no saved session: {error}") from error
