"""The result of a run: its score, the compressors it is compared with, and a sample."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mhesa.data.files import Document
from mhesa.file_names import RUN_FILES
from mhesa.inference.evaluation import PredictionCost
from mhesa.inference.generation import stream
from mhesa.inference.sampling import Sampling
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.tokenizers.base import Tokenizer
from mhesa.tokenizers.stream import character_start

SAMPLE_TOKENS = 300


@dataclass(frozen=True)
class Summary:
    """The result of a run."""

    folder: Path
    steps: int
    seconds: float
    score: PredictionCost
    compressors: dict[str, float]
    sample: bytes

    @property
    def files(self) -> list[str]:
        """The names of the run's files in its folder."""
        return [name for name in RUN_FILES if (self.folder / name).exists()]


def first_bytes(documents: Iterable[Document], size: int) -> list[Document]:
    """The first documents, up to about `size` bytes and at least one."""
    chosen: list[Document] = []
    for document in documents:
        if size <= 0:
            break
        chosen.append(replace(document, data=document.data[: character_start(document.data, size)]))
        size -= len(document.data)
    return chosen


def compress(documents: Iterable[Document]) -> dict[str, float]:
    """Bits per byte that common compressors need for the concatenated documents."""
    data = b"".join(document.data for document in documents)
    sizes = {"xz -9": len(lzma.compress(data, preset=9)), "gzip -9": len(gzip.compress(data, 9))}
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def write_sample(model: GatedExponentialSmoothingLM, tokenizer: Tokenizer, seed: int) -> bytes:
    """A text that the model writes without a prompt."""
    start = torch.tensor([tokenizer.eos_token_id])
    tokens = stream(model, start, max_new_tokens=SAMPLE_TOKENS, sampling=Sampling(temperature=0.8), seed=seed)
    return tokenizer.decode_bytes(list(tokens))
