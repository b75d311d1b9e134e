"""Tokenizers for those who go on with transformers' methods, as training does when it saves them."""

from __future__ import annotations

from pathlib import Path

from mhesa import tokens
from mhesa.hf.tokenization import ByteTokenizer
from mhesa.tokens.vocabulary import TextTokenizer, byte_alphabet, train_bpe

__all__ = ["TextTokenizer", "byte_alphabet", "open_tokenizer", "train_bpe"]


def open_tokenizer(path: str | Path) -> ByteTokenizer | TextTokenizer:
    """As `mhesa.tokens.open_tokenizer`, with bytes as a `ByteTokenizer`."""
    tokenizer = tokens.open_tokenizer(path)
    if isinstance(tokenizer, TextTokenizer | ByteTokenizer):
        return tokenizer
    return ByteTokenizer.from_pretrained(path, local_files_only=True)
