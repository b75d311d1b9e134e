"""Corpora: reading text, holding some of it out, tokenising it once, cutting it into windows."""

from mhesa.data.corpus import Corpus, Source, open_corpus
from mhesa.data.files import Document, File
from mhesa.data.holdout import Holdout
from mhesa.data.sources import find_files, read_sources, standard_library
from mhesa.data.standard_input import standard_input
from mhesa.data.windows import Windows, pack

__all__ = [
    "Corpus",
    "Document",
    "File",
    "Holdout",
    "Source",
    "Windows",
    "find_files",
    "open_corpus",
    "pack",
    "read_sources",
    "standard_input",
    "standard_library",
]
