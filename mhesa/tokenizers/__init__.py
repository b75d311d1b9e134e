"""Tokenizers: bytes, or a vocabulary; either takes and gives bytes."""

from mhesa.tokenizers.bytes import Bytes
from mhesa.tokenizers.files import open_tokenizer
from mhesa.tokenizers.vocabulary import TextTokenizer, train_bpe

__all__ = ["Bytes", "TextTokenizer", "open_tokenizer", "train_bpe"]
