"""Bytes as tokens; `mhesa.hf.ByteTokenizer` is the same with transformers' methods."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken

from mhesa import remote_code
from mhesa.errors import InputError
from mhesa.tokenizers.base import Tokenizer
from mhesa.tokenizers.chat import mark
from mhesa.tokenizers.config import write_config

BYTE_TOKENIZER = "ByteTokenizer"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256
PIECES = {byte: bytes([byte]) for byte in range(256)} | {END_OF_TEXT_ID: b""}
# Surrogates other than those of `surrogateescape`.
OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")


class Bytes(Tokenizer):
    r"""Ids 0 to 255 are the bytes, 256 is `<|endoftext|>`, which begins and ends documents.

    Args:
        added_tokens: further tokens by id.
        eos_token: the one that begins and ends documents, if not `<|endoftext|>`.
        chat_template: how a conversation becomes text, a Jinja template as transformers takes them.
        pad_token: the one that fills rows in transformers; `eos_token` if omitted or not among the tokens.

    Raises:
        InputError: `eos_token` is not among the tokens.

    >>> tokenizer = Bytes()
    >>> tokenizer.decode_bytes(tokenizer.encode_bytes(b"\xff\x00"))
    b'\xff\x00'
    """

    def __init__(
        self,
        added_tokens: Mapping[int, AddedToken] | None = None,
        eos_token: str = END_OF_TEXT,
        chat_template: str | None = None,
        pad_token: str | None = None,
    ) -> None:
        # Called as in transformers, for the methods that `mhesa.hf.ByteTokenizer` inherits.
        self._added_tokens_decoder = {END_OF_TEXT_ID: AddedToken(END_OF_TEXT, special=True)}
        self._added_tokens_decoder |= added_tokens or {}
        ids = {token.content: index for index, token in self._added_tokens().items()}
        if eos_token not in ids:
            raise InputError(f"eos_token {eos_token!r} is not one of the tokens {', '.join(ids)}")
        self.eos_token, self.eos_token_id = eos_token, ids[eos_token]
        self.pad_token = pad_token if pad_token in ids else eos_token
        self.pad_token_id = ids[self.pad_token]
        self.chat_template = chat_template

    def __len__(self) -> int:
        return max(self._added_tokens()) + 1

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids of `data`, which may be anything, `(tokens,)`; no special token is looked for."""
        return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of several texts, `(tokens,)` each: the texts' own bytes, not copied."""
        return [np.frombuffer(text, dtype=np.uint8) for text in texts]

    def sizes_in_text(self, ids: np.ndarray, text: bytes) -> np.ndarray:
        """How many bytes of a text each token stands for, `(tokens,)`: one."""
        return np.ones(len(ids), dtype=np.int64)

    def fingerprint(self) -> str:
        """The same for two tokenizers only if they give the same ids for every text."""
        return "bytes"

    def save_pretrained(self, folder: str | Path) -> Any:
        """Write `tokenizer_config.json`, what it names, and the chat template if there is one."""
        tokens = {
            str(index): {
                "content": token.content,
                "special": token.special,
                **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
            }
            for index, token in sorted(self._added_tokens().items())
        }
        folder = Path(folder)
        write_config(folder, BYTE_TOKENIZER, self, added_tokens_decoder=tokens, auto_map=remote_code.BYTES)
        remote_code.write_module(folder)

    def _added_tokens(self) -> Mapping[int, AddedToken]:
        return self._added_tokens_decoder

    def pieces(self, skip_special_tokens: bool = True) -> dict[int, bytes]:
        """The bytes of every token by its id; special ones have none, or those of their texts."""
        return PIECES | {
            index: b"" if skip_special_tokens and token.special else to_bytes(token.content)
            for index, token in self._added_tokens().items()
        }

    def _encode_marked(self, text: str) -> list[int]:
        special = self.special_tokens()
        tokens = {it.content: i for i, it in self._added_tokens().items() if i not in special}
        tokens |= {mark(token): token for token in special}
        ids: list[int] = []
        for piece in token_splitter(tokens).split(text):
            ids += [tokens[piece]] if piece in tokens else to_bytes(piece)
        return ids


def to_bytes(text: str) -> bytes:
    """Text as UTF-8; surrogates become the bytes they stand for, or those that `surrogatepass` gives."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return OTHER_SURROGATES.sub(_escape, text).encode("utf-8", "surrogateescape")


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


def token_splitter(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose `split` cuts the tokens out of a text, the longest where several begin."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")
