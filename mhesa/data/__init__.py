"""Corpora: reading text, holding some of it out, tokenising it once, cutting it into windows."""

from mhesa.data.corpus import Corpus, Source, Tokenizer, open_corpus
from mhesa.data.holdout import Holdout
from mhesa.data.sources import Document, read_sources, standard_library
from mhesa.data.windows import Windows, pack

__all__ = [
    "Corpus",
    "Document",
    "Holdout",
    "Source",
    "Tokenizer",
    "Windows",
    "open_corpus",
    "pack",
    "read_sources",
    "standard_library",
]
