"""How well a model predicts text: loss, bits per byte and perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from mhesa.data.files import Document
from mhesa.inference.decoder import Decoder
from mhesa.inference.parallel_decoder import WINDOW, ParallelDecoder
from mhesa.inference.statistics import BITS, read_tokens
from mhesa.model.lm import GatedExponentialSmoothingLM
from mhesa.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class PredictionCost:
    """The cost of predicting a text. The sum of two is that of both texts.

    Args:
        nats: cross-entropy, summed over all tokens.
        tokens: predicted tokens.
        bytes: length of the text, in bytes.

    >>> cost = PredictionCost(nats=1386.29, tokens=1000, bytes=1000)
    >>> round((cost + PredictionCost(nats=0, tokens=1000, bytes=1000)).bits_per_byte, 3)
    1.0
    """

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: PredictionCost) -> PredictionCost:
        return PredictionCost(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token; 0 where there is none."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode one byte of the text; comparable between models with different tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """`exp(loss)`."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, float]:
        """The figures by the names they have in JSON."""
        names = ("loss", "bits_per_byte", "perplexity", "tokens", "bytes")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def evaluate(
    model: GatedExponentialSmoothingLM | Decoder | ParallelDecoder,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> PredictionCost:
    """Score whole documents, in windows; the state is carried from window to window of a document.

    Every token is predicted, the first one from an end-of-text token.

    Args:
        model: the language model in any precision, or a decoder of it. All processes of a `ParallelDecoder`
            must call this with the same documents.
        tokenizer: tokenizer of the model.
        documents: texts; each starts from the initial state.
        on_progress: called after each window with its number of tokens.

    Raises:
        FloatingPointError: the model's logits are not numbers.
    """
    decoder = Decoder(model) if isinstance(model, GatedExponentialSmoothingLM) else model
    size = WINDOW * (decoder.processes if isinstance(decoder, ParallelDecoder) else 1)
    total = PredictionCost(0.0, 0, 0)
    for document in documents:
        ids = torch.from_numpy(tokenizer.encode_bytes(document.data).astype("int64"))
        inputs = torch.cat([torch.tensor([tokenizer.eos_token_id]), ids])[:-1]
        state = decoder.initial_state(1)
        for read, targets in zip(inputs.split(size), ids.split(size), strict=True):
            bits = read_tokens(decoder, read, targets, state, BITS)["bits"].sum()
            total += PredictionCost(bits * math.log(2), len(targets), 0)
            on_progress(len(targets))
        total += PredictionCost(0.0, 0, len(document.data))
    return total
