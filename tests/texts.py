"""Texts to read, and how tests read them."""

from mhesa.data.corpus import Source, open_corpus
from mhesa.hf import ByteTokenizer


def lines(n, word="line"):
    return "".join(f"{word} {index}: {index * index}\n" for index in range(n)).encode()


def joined(documents):
    return b"".join(document.data for document in documents)


def tokens_of(path, tokenizer=None, **options):
    return open_corpus(Source([str(path)], **options), tokenizer or ByteTokenizer())
