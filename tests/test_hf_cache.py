"""The cache of states that transformers hands from call to call."""

import copy

import pytest
import torch
from hf_models import make, some_ids
from transformers import DynamicCache

from mhesa.hf import MhesaCache, MhesaConfig


@pytest.fixture
def model():
    return make().double()


@pytest.fixture
def ids():
    return some_ids()


def test_a_cache_continues(model, ids):
    whole = model(ids).logits
    cache, pieces = MhesaCache(model.config), []
    for piece in ids.split([4, 1, 1, 5], dim=1):
        pieces.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert cache.get_seq_length() == 11
    assert cache.get_mask_sizes(2, 0) == (13, 0)
    assert cache.layers[0].batch_size == 3


def test_a_cache_holds_fp32_whatever_the_model(ids):
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        layers = make().to(dtype)(ids).past_key_values.layers
        assert all(layer.state.dtype == expected for layer in layers)
        assert all(layer.state.shape == (3, 24) for layer in layers)


def test_rows_of_a_cache(model, ids):
    cache = model(ids).past_key_values
    states = [layer.state for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(c.state, s[[2, 0, 0]]) for c, s in zip(cache.layers, states, strict=True))
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    assert all(torch.equal(c.state, s[[2, 2, 0, 0]]) for c, s in zip(cache.layers, states, strict=True))
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_copies_of_a_cache_go_their_own_ways(model, ids):
    cache = model(ids).past_key_values
    kept = copy.deepcopy(cache)
    first = model(ids[:, :2], past_key_values=cache).logits
    assert (cache.get_seq_length(), kept.get_seq_length()) == (13, 11)
    assert torch.equal(model(ids[:, :2], past_key_values=kept).logits, first)


def test_an_empty_cache_has_no_rows_to_change(model):
    cache = MhesaCache(model.config)
    cache.reorder_cache(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.layers[0].batch_size == -1
    assert cache.layers[0].get_max_length() == cache.layers[0].get_max_cache_shape() == -1


def test_a_cache_refuses_crop_and_update(model, ids):
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"cannot forget its last tokens; copy\.deepcopy"):
        cache.crop(-1)
    with pytest.raises(TypeError, match="holds states, not keys and values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_a_cache_is_never_dropped_in_silence(model, ids):
    with pytest.raises(TypeError, match=r"must be a MhesaCache, not a DynamicCache: make it with"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="leave one of them out"):
        model(ids, past_key_values=MhesaCache(model.config), use_cache=False)
    with pytest.raises(TypeError, match="two names of one argument: pass one of them"):
        model(ids, past_key_values=MhesaCache(model.config), cache=MhesaCache(model.config))
    with pytest.raises(ValueError, match="is for 2 blocks and this model has 3"):
        model(ids, past_key_values=MhesaCache(MhesaConfig(num_hidden_layers=2)))
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="holds 3 sequences and this batch has 2"):
        model(ids[:2], past_key_values=cache)


def test_a_cache_is_returned_in_evaluation_or_when_asked_for(model, ids):
    assert model(ids).past_key_values is not None
    assert model(ids, use_cache=False).past_key_values is None
    assert make(use_cache=False)(ids).past_key_values is None
    assert model.train()(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
