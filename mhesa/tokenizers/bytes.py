"""Bytes as tokens, for all that needs no transformers; `mhesa.hf.ByteTokenizer` is for the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from mhesa.hf.tokenization import ByteTokenizer

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256
PIECES = {byte: bytes([byte]) for byte in range(256)} | {END_OF_TEXT_ID: b""}


class Bytes:
    r"""Ids 0 to 255 are the bytes, 256 is `<|endoftext|>`, which begins and ends documents.

    >>> tokenizer = Bytes()
    >>> tokenizer.decode_bytes(tokenizer.encode_bytes(b"\xff\x00"))
    b'\xff\x00'
    """

    def __init__(self) -> None:
        self.eos_token, self.eos_token_id = END_OF_TEXT, END_OF_TEXT_ID
        self.chat_template: str | None = None

    def __len__(self) -> int:
        return len(PIECES)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids of `data`, which may be anything, `(tokens,)`; no special token is looked for."""
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of several texts, the texts themselves as numbers."""
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def fingerprint(self) -> str:
        """What tells it from every tokenizer that gives other ids."""
        return "bytes"

    def decode_bytes(self, ids: Iterable[int] | np.ndarray | Tensor) -> bytes:
        """The bytes of `ids`; special tokens give none.

        Raises:
            ValueError: an id that no token has.
        """
        return self._join(ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids, self._pieces())

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> Any:
        """The ids of a conversation; see transformers' method of that name."""
        return self._whole.apply_chat_template(messages, **kwargs)

    def save_pretrained(self, folder: str | Path) -> Any:
        """Write what `AutoTokenizer` asks for."""
        return self._whole.save_pretrained(folder)

    @cached_property
    def _whole(self) -> ByteTokenizer:
        from mhesa.hf.tokenization import ByteTokenizer

        return ByteTokenizer()

    def _pieces(self) -> dict[int, bytes]:
        """The bytes of every token."""
        return PIECES

    def _join(self, ids: Iterable[int], pieces: dict[int, bytes]) -> bytes:
        try:
            return b"".join(map(pieces.__getitem__, ids))
        except KeyError as error:
            raise ValueError(f"no token has the id {error}; the largest is {len(self) - 1}") from None
