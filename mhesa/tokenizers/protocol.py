"""What the package asks of a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """Turns bytes into ids and back, and has a token that separates documents.

    Attributes:
        eos_token_id: the end-of-text token; a document begins behind one.
    """

    eos_token_id: Any

    def __len__(self) -> int:
        """The number of tokens in the vocabulary."""

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of a text, `(tokens,)`."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of several texts, each `(tokens,)`."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The text of ids."""

    def fingerprint(self) -> str:
        """A string that differs between tokenizers that give different ids."""
