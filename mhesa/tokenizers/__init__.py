"""Tokenizers: bytes, or a vocabulary; either takes and gives bytes."""

from mhesa.tokenizers.bytes import Bytes
from mhesa.tokenizers.config import TOKENIZER_CONFIG
from mhesa.tokenizers.files import open_tokenizer
from mhesa.tokenizers.vocabulary import TOKENIZER, TextTokenizer, train_bpe

__all__ = ["TOKENIZER", "TOKENIZER_CONFIG", "Bytes", "TextTokenizer", "open_tokenizer", "train_bpe"]
