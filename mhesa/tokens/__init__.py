"""Tokenizers: bytes, or a vocabulary; either takes and gives bytes."""

from mhesa.tokens.bytes import Bytes
from mhesa.tokens.files import TOKENIZER, TOKENIZER_CONFIG, open_tokenizer
from mhesa.tokens.vocabulary import TextTokenizer, train_bpe

__all__ = ["TOKENIZER", "TOKENIZER_CONFIG", "Bytes", "TextTokenizer", "open_tokenizer", "train_bpe"]
