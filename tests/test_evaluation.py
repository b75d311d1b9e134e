"""Scores against a direct computation."""

import math

import pytest
import torch

from mhesa import GatedExponentialSmoothingLM
from mhesa.data.files import Document
from mhesa.hf import ByteTokenizer
from mhesa.inference import evaluation
from mhesa.inference.evaluation import PredictionCost, evaluate


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GatedExponentialSmoothingLM(num_tokens=257, dim=8, depth=2, heads=2, dim_mhesa=6).double()


TEXT = b"any bytes \x00\xff, and then some more of them"


def whole_cost(model, data):
    """Nats for `data` after an end-of-text token, in one pass."""
    ids = torch.tensor([256, *data])
    log_probabilities = model(ids[None, :-1])[0].log_softmax(-1)
    return -log_probabilities[torch.arange(len(data)), ids[1:]].sum().item()


@pytest.mark.parametrize("window", [1, 7, 4096])
def test_windows_have_the_cost_of_one_pass(model, monkeypatch, window):
    monkeypatch.setattr(evaluation, "WINDOW", window)
    score = evaluate(model, ByteTokenizer(), [Document("a", TEXT)])
    assert score.nats == pytest.approx(whole_cost(model, TEXT), rel=1e-6)
    assert (score.tokens, score.bytes) == (len(TEXT), len(TEXT))


def test_every_document_starts_from_the_initial_state(model):
    documents = [Document("a", TEXT), Document("b", b"x")]
    score = evaluate(model, ByteTokenizer(), documents)
    assert score.nats == pytest.approx(whole_cost(model, TEXT) + whole_cost(model, b"x"), rel=1e-6)


def test_progress_counts_every_token(model):
    seen = []
    evaluate(model, ByteTokenizer(), [Document("a", TEXT), Document("b", b"xy")], seen.append)
    assert sum(seen) == len(TEXT) + 2


def test_figures_follow_from_the_cost():
    score = PredictionCost(nats=200 * math.log(2), tokens=50, bytes=100)
    assert score.bits_per_byte == pytest.approx(2)
    assert score.loss == pytest.approx(4 * math.log(2))
    assert score.perplexity == pytest.approx(16)
    assert list(score.as_dict()) == ["loss", "bits_per_byte", "perplexity", "tokens", "bytes"]
