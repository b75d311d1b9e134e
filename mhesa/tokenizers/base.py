"""What the package asks of a tokenizer, and what all its tokenizers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from torch import Tensor

from mhesa.errors import InputError
from mhesa.tokenizers.chat import Messages, mark_special_tokens, render_chat


class Tokenizer(ABC):
    """Turns bytes into ids and back, and has a token that separates documents.

    Attributes:
        eos_token, eos_token_id: the end-of-text token; each document starts with it.
        pad_token, pad_token_id: the padding token; that of end of text if the vocabulary has none of its own.
        chat_template: how a conversation becomes text, a Jinja template as transformers takes them.
    """

    eos_token: Any
    eos_token_id: Any
    pad_token: Any
    pad_token_id: Any
    chat_template: Any

    @abstractmethod
    def __len__(self) -> int:
        """The number of tokens in the vocabulary."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """The ids of several texts, `(tokens,)` each; special tokens in them are not recognised.

        Raises:
            InputError: bytes that are not UTF-8, and the vocabulary has no tokens for bytes.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A string that differs between tokenizers that give different ids."""

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> Any:
        """Write the files that `open_tokenizer` and transformers' `AutoTokenizer` read."""

    @abstractmethod
    def _added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokens beside the vocabulary's own, special ones among them, by their ids."""

    @abstractmethod
    def pieces(self) -> Mapping[int, bytes]:
        """The bytes of every token by its id, none for a special one."""

    @abstractmethod
    def _encode_marked(self, text: str) -> list[int]:
        """The ids of a text in which marks stand for special tokens, see `mhesa.tokenizers.chat`."""

    def special_tokens(self) -> dict[int, str]:
        """The texts of the special tokens by their ids."""
        special = {index: token.content for index, token in self._added_tokens().items() if token.special}
        return special | {self.eos_token_id: self.eos_token, self.pad_token_id: self.pad_token}

    def sizes_in_text(self, ids: np.ndarray, text: bytes) -> np.ndarray:
        """How many bytes of a text each of its tokens stands for, `(tokens,)`; together they are all of it.

        Not always the token's own bytes: some tokenizers put a space before every text, and some change it.
        """
        sizes: np.ndarray = self._piece_sizes[ids]
        added = sizes.sum() - len(text)
        if added == 1 and self.pieces()[int(ids[0])].startswith(b" "):
            sizes[0] -= 1
        return sizes if added in (0, 1) and sizes.sum() == len(text) else self._found_sizes(ids, text)

    @cached_property
    def _piece_sizes(self) -> np.ndarray:
        sizes = np.zeros(len(self), dtype=np.int64)
        for token, piece in self.pieces().items():
            sizes[token] = len(piece)
        return sizes

    def _found_sizes(self, ids: np.ndarray, text: bytes) -> np.ndarray:
        """See `sizes_in_text`, where the tokens' own bytes are not those of the text: in their proportion."""
        ends = np.cumsum(self._piece_sizes[ids])
        if len(ids):
            ends = ends * len(text) // max(int(ends[-1]), 1)
            ends[-1] = len(text)
        return np.diff(ends, prepend=0)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of one text, see `encode_batch`."""
        return self.encode_batch([data])[0]

    def decode_bytes(self, ids: Iterable[int] | np.ndarray | Tensor) -> bytes:
        """The bytes of `ids`, `(tokens,)`; special tokens give none.

        Raises:
            InputError: an id that no token has.
        """
        return self._join(ids.tolist() if isinstance(ids, Tensor | np.ndarray) else ids, self.pieces())

    def apply_chat_template(self, messages: Messages, *, add_generation_prompt: bool = False) -> Any:
        """The ids of a conversation, a list.

        The template's special tokens become their ids; the text of messages is text, whatever it says.

        Args:
            messages: a `role` and a `content` each.
            add_generation_prompt: end with the words that begin an answer.

        Raises:
            jinja2.TemplateError: the template is wrong, or refuses the conversation.
            InputError: a message that cannot be encoded, or holds a code point of marks.
        """
        assert self.chat_template is not None, "the tokenizer has no chat template"
        return self._encode_marked(render_chat(self, messages, add_generation_prompt))

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """The ids of a text in which the texts of special tokens become these tokens.

        Raises:
            InputError: a text that cannot be encoded.
        """
        return self._encode_marked(mark_special_tokens(text, self.special_tokens()))

    def _join(self, ids: Iterable[int], pieces: Mapping[int, bytes]) -> bytes:
        try:
            return b"".join(map(pieces.__getitem__, ids))
        except KeyError as error:
            raise InputError(f"no token has the id {error}; the largest is {len(self) - 1}") from None
