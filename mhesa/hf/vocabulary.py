"""Tokenizers for those who go on with transformers' methods, as training does when it saves them."""

from __future__ import annotations

from pathlib import Path

from mhesa import tokenizers
from mhesa.hf.tokenization import ByteTokenizer
from mhesa.tokenizers.vocabulary import TextTokenizer, byte_alphabet, train_bpe

__all__ = ["TextTokenizer", "byte_alphabet", "open_tokenizer", "train_bpe"]


def open_tokenizer(path: str | Path) -> ByteTokenizer | TextTokenizer:
    """As `mhesa.tokenizers.open_tokenizer`, with bytes as a `ByteTokenizer`."""
    tokenizer = tokenizers.open_tokenizer(path)
    if isinstance(tokenizer, TextTokenizer | ByteTokenizer):
        return tokenizer
    return ByteTokenizer.from_pretrained(path, local_files_only=True)
