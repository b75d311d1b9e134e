"""Surprisal, entropy and rank against scipy in fp64, and surprisal's kernel on its own."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder
from mhesa.inference.decoder.statistics_kernel import LANES, MIN_PARALLEL, measure
from mhesa.inference.logprobs import token_logprobs
from mhesa.inference.statistics import BITS, bits, entropy, rank, read_tokens, token_statistics


def surprisal(logits, targets):
    return measure(logits, targets, bits_only=True)[0]


def log_softmax(logits):
    return special.log_softmax(logits.double().numpy(), axis=1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    num_tokens=st.sampled_from([1, 2, LANES - 1, LANES, LANES + 1, 257, 1000]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    shift=st.sampled_from([0.0, -1e5, 1e5]),
    padding=st.integers(0, 3),
    columns_first=st.booleans(),
    seed=st.integers(0, 99),
)
def test_surprisal_is_that_of_fp64(rows, num_tokens, spread, shift, padding, columns_first, seed):
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((rows, num_tokens + padding), torch.nan)
    logits = memory[:, :num_tokens]
    if columns_first:
        logits = torch.full((num_tokens + padding, rows), torch.nan).T[:, :num_tokens]
    logits.copy_(torch.randn(rows, num_tokens, generator=generator) * spread + shift)
    targets = torch.randint(num_tokens, (rows,), generator=generator)
    expected = -log_softmax(logits)[np.arange(rows), targets.numpy()] / math.log(2)
    np.testing.assert_allclose(surprisal(logits, targets), expected, rtol=2e-7, atol=4e-7)
    found, entropies, ranks = measure(logits, targets)
    np.testing.assert_array_equal(found, surprisal(logits, targets))
    expected = stats.entropy(np.exp(log_softmax(logits)), base=2, axis=1)
    np.testing.assert_allclose(entropies, expected, rtol=1e-6, atol=1e-6)
    own = logits.gather(1, targets[:, None])
    np.testing.assert_array_equal(ranks, 1 + (logits > own).sum(1))


def test_surprisal_of_logits_that_are_not_finite():
    nan, inf = math.nan, math.inf
    rows = [[1.0, nan, 2.0], [-inf, 0.0, 0.0], [-inf, 0.0, 0.0], [inf, 0.0, 0.0], [-inf] * 3]
    # Far from the first, so that each stands in a vector and in the rest after the last whole one.
    for width in (3, 2 * LANES, 2 * LANES + 5):
        logits = torch.full((len(rows), width), -inf)
        logits[:, [0, width - 2, width - 1]] = torch.tensor(rows)
        found = surprisal(logits, torch.tensor([width - 1, width - 1, 0, 0, 0]))
        np.testing.assert_array_equal(found, [nan, 1.0, inf, nan, nan])


@pytest.mark.parametrize("names", [{"bits": bits}, {"bits": bits, "entropy": entropy}])
def test_a_model_of_no_numbers_is_an_error(names):
    model = GatedExponentialSmoothingLM(num_tokens=8, dim=4, depth=1, heads=1, dim_mhesa=4).eval()
    with torch.no_grad():
        model.to_logits.weight[3] = math.nan
    decoder, ids = Decoder(model), torch.tensor([1, 2])
    with pytest.raises(FloatingPointError, match="the model's logits are not numbers"):
        read_tokens(decoder, ids, ids, decoder.initial_state(1), names)
    with pytest.raises(FloatingPointError, match="the model's logits are not numbers"):
        token_logprobs(decoder.predict(ids, decoder.initial_state(1)), ids, 0)


def test_the_number_of_threads_changes_no_bit_of_surprisal():
    logits, targets = torch.randn(1000, 300), torch.randint(300, (1000,))
    assert logits.numel() >= MIN_PARALLEL
    alone = surprisal(logits, targets)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        np.testing.assert_array_equal(surprisal(logits, targets), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("target", [-1, 5])
def test_a_token_without_a_logit_is_refused(target):
    with pytest.raises(IndexError, match="targets must be 0 to 4"):
        surprisal(torch.zeros(2, 5), torch.tensor([0, target]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_statistics_are_those_of_scipy(dtype):
    logits = (2 * torch.randn(300, 70)).to(dtype)
    targets = torch.randint(70, (300,))
    logprobs = log_softmax(logits)
    found = token_statistics(logits, targets, {"bits": bits, "entropy": entropy, "rank": rank})
    own = logprobs[np.arange(300), targets.numpy()]
    np.testing.assert_allclose(found["bits"], -own / math.log(2), rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(found["entropy"], stats.entropy(np.exp(logprobs), base=2, axis=1), rtol=2e-6)
    np.testing.assert_array_equal(found["rank"], 1 + (logprobs > own[:, None]).sum(1))
    assert token_statistics(logits, targets, {}) == {}
    alone = token_statistics(logits, targets, BITS)["bits"]
    np.testing.assert_allclose(alone, found["bits"], rtol=1e-6, atol=2e-6)


def test_predictions_and_tokens_must_be_as_many():
    for logits, tokens in ((1, 2), (2, 1)):
        with pytest.raises(InputError, match=f"{tokens} targets for {logits} tokens"):
            surprisal(torch.zeros(logits, 5), torch.zeros(tokens, dtype=torch.int64))
    decoder = Decoder(GatedExponentialSmoothingLM(num_tokens=5, dim=4, depth=1, heads=1, dim_mhesa=4))
    state = decoder.initial_state(1)
    for targets in (2, 4):
        with pytest.raises(InputError, match=f"{targets} targets for 3 tokens"):
            read_tokens(decoder, torch.tensor([1, 2, 3]), torch.arange(targets), state, BITS)
    assert not state.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_tokens_of_any_integer_type_are_read(dtype):
    logits = torch.randn(20, 9)
    targets = torch.randint(9, (20,))
    np.testing.assert_array_equal(surprisal(logits, targets.to(dtype)), surprisal(logits, targets))
