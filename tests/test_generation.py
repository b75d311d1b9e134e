"""Sampling and streaming against direct computations."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from mhesa import GatedExponentialSmoothingLM, generation
from mhesa.errors import InputError
from mhesa.generation import Sampling, prefill, stream, until


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GatedExponentialSmoothingLM(num_tokens=19, dim=8, depth=2, heads=2, dim_mhesa=6).double()


def test_greedy_tokens_are_those_of_full_passes(model):
    ids = torch.tensor([1, 2, 3])
    for token in stream(model, ids, max_new_tokens=30, sampling=Sampling(temperature=0)):
        assert token == model(ids[None])[0, -1].argmax().item()
        ids = torch.cat([ids, torch.tensor([token])])
    assert len(ids) == 33


def test_a_seed_repeats_and_another_does_not(model):
    ids = torch.tensor([4])
    runs = [list(stream(model, ids, max_new_tokens=40, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_end_of_text_ends_and_is_not_given_out(model):
    ids = torch.tensor([4])
    tokens = list(stream(model, ids, max_new_tokens=60, seed=1))
    ended = list(stream(model, ids, max_new_tokens=60, seed=1, eos_token_id=tokens[5]))
    assert ended == tokens[: tokens.index(tokens[5])]


@pytest.mark.parametrize("window", [1, 3, 100])
def test_prefill_in_windows_is_one_pass(model, monkeypatch, window):
    monkeypatch.setattr(generation, "WINDOW", window)
    ids = torch.randint(19, (2, 20))
    whole, final = model(ids, return_state=True)
    logits, state = prefill(model, ids)
    assert torch.allclose(logits, whole[:, -1], rtol=0, atol=1e-12)
    assert torch.allclose(state, final, rtol=0, atol=1e-12)
    _, middle = prefill(model, ids[:, :7])
    assert torch.allclose(prefill(model, ids[:, 7:], middle)[0], whole[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(), []),
        (Sampling(temperature=0.5), [TemperatureLogitsWarper(0.5)]),
        (Sampling(temperature=2.0, top_k=3), [TemperatureLogitsWarper(2.0), TopKLogitsWarper(3)]),
        (Sampling(top_p=0.7), [TopPLogitsWarper(0.7)]),
        (Sampling(top_k=5, top_p=0.6), [TopKLogitsWarper(5), TopPLogitsWarper(0.6)]),
    ],
    ids=str,
)
def test_draws_follow_the_distribution_of_transformers(sampling, warpers):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 8, generator=generator)
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    expected = expected.double().softmax(-1)[0]
    draws = sampling.draw(logits.expand(20_000, -1), generator)
    counts = torch.bincount(draws, minlength=8)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    if possible.sum() > 1:
        assert stats.chisquare(counts[possible], 20_000 * expected[possible]).pvalue > 1e-4


def test_a_tiny_temperature_is_greedy():
    logits = torch.randn(4, 50) * 100
    assert torch.equal(Sampling(temperature=1e-30).draw(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}],
    ids=str,
)
def test_sampling_that_cannot_be_is_refused(values):
    with pytest.raises(InputError, match=f"{next(iter(values))} must be"):
        Sampling(**values)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(InputError, match="at least one token"):
        next(stream(model, torch.tensor([], dtype=torch.long), max_new_tokens=1))


@given(
    text=st.binary(max_size=30), ending=st.binary(max_size=3), cuts=st.lists(st.integers(0, 30), max_size=5)
)
def test_until_cuts_at_the_first_ending(text, ending, cuts):
    bounds = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(bounds)]
    expected = text.partition(ending)[0] if ending else text
    assert b"".join(until(iter(pieces), ending)) == expected


def test_until_hands_on_what_cannot_end():
    handed = until(iter([b"abc", b"d"]), b"xx")
    assert next(handed) == b"abc"
