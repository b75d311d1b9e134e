"""`generate` with its cache against `generate` without one, in fp64: they must choose the same tokens."""

import copy
from functools import wraps

import pytest
import torch
from transformers import DynamicCache, set_seed

from mhesa import GatedExponentialSmoothingLM
from mhesa.hf import ByteTokenizer, MhesaCache, MhesaConfig, MhesaForCausalLM
from mhesa.hf.cache import CACHE, MhesaCacheLayer

TOKENS = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = MhesaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        heads=4,
        dim_mhesa=24,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = MhesaForCausalLM(config).double().eval()
    with torch.no_grad():
        # The next token must hang on the state, or a state lost or mixed up would not be seen.
        for block in model.model.layers:
            block.mhesa.alphas.fill_(-1)
            block.mhesa.dampen_factors.fill_(4)
            block.mhesa.param_D.zero_()
            block.to_gate.weight.mul_(10)
    return model


@pytest.fixture
def ids():
    return torch.randint(1, 40, (3, 9), generator=torch.Generator().manual_seed(1))


def generate(model, ids, **arguments):
    set_seed(0)
    arguments = {"max_new_tokens": TOKENS, "do_sample": False, **arguments}
    return model.generate(ids, **arguments)


@pytest.fixture
def lengths(model, monkeypatch):
    """How many tokens each call of the model is given."""
    seen = []
    forward = MhesaForCausalLM.forward

    @wraps(forward)
    def counted(self, input_ids=None, **arguments):
        seen.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(model, "forward", counted.__get__(model))
    return seen


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "top-k": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "sampled-beams": {"num_beams": 3, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "several-beams": {"num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("mode", MODES)
def test_cached_equals_uncached(model, ids, mode):
    cached = generate(model, ids, **MODES[mode])
    assert torch.equal(cached, generate(model, ids, use_cache=False, **MODES[mode]))
    assert cached.shape == (3 * MODES[mode].get("num_return_sequences", 1), 9 + TOKENS)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_scores_cached_equal_scores_uncached(model, ids, mode):
    arguments = {"return_dict_in_generate": True, "output_scores": True, **MODES[mode]}
    cached = generate(model, ids, **arguments)
    uncached = generate(model, ids, use_cache=False, **arguments)
    for ours, theirs in zip(cached.scores, uncached.scores, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_greedy_equals_the_plain_models(model, ids):
    lm, row = model.to_plain(), ids[:1]
    for _ in range(TOKENS):
        row = torch.cat([row, lm(row)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, ids[:1]), row)


def test_the_prompt_is_read_once_and_then_a_token_a_call(model, ids, lengths):
    generate(model, ids)
    assert lengths == [9] + [1] * (TOKENS - 1)
    lengths.clear()
    generate(model, ids, use_cache=False)
    assert lengths == list(range(9, 9 + TOKENS))


def test_transformers_asks_us_for_the_cache(model, ids, monkeypatch):
    """`_prepare_cache_for_generation` is private: should it be renamed, this must fail and not the user."""
    calls = []
    prepare = MhesaForCausalLM._prepare_cache_for_generation

    def counted(self, *arguments, **named):
        calls.append(1)
        return prepare(self, *arguments, **named)

    monkeypatch.setattr(MhesaForCausalLM, "_prepare_cache_for_generation", counted)
    output = generate(model, ids, return_dict_in_generate=True)
    assert calls == [1]
    assert type(output.past_key_values) is MhesaCache
    assert output.past_key_values.get_seq_length() == 9 + TOKENS - 1


def test_beams_move_their_states_with_them(model, ids, monkeypatch):
    right = generate(model, ids, num_beams=3, use_cache=False)
    monkeypatch.setattr(MhesaCacheLayer, "reorder_cache", lambda self, rows: None)
    assert not torch.equal(generate(model, ids, num_beams=3), right)


@pytest.mark.parametrize("mode", ["greedy", "beams", "several-beams"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padding_equals_a_solo_run(model, ids, mode, use_cache):
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 8)):
        ids[row, :padding] = 0
        mask[row, :padding] = 0
    batch = generate(model, ids, attention_mask=mask, use_cache=use_cache, **MODES[mode])
    several = MODES[mode].get("num_return_sequences", 1)
    for row, padding in enumerate((0, 3, 8)):
        solo = generate(model, ids[row : row + 1, padding:], **MODES[mode])
        ours = batch[row * several : (row + 1) * several]
        assert torch.equal(ours[:, 9:], solo[:, 9 - padding :])


@pytest.mark.parametrize("only_new_tokens", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_is_handed_from_turn_to_turn(model, ids, lengths, only_new_tokens, padded):
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    first = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    more = torch.cat([first.sequences, ids.flip(1)], dim=1)
    mask = torch.cat([mask, torch.ones(3, TOKENS + 9, dtype=torch.long)], dim=1)
    uncached = generate(model, more, attention_mask=mask, use_cache=False)
    cache = first.past_key_values
    unseen = more.shape[1] - cache.get_seq_length()
    assert unseen == 10
    lengths.clear()
    given = more[:, -unseen:] if only_new_tokens else more
    second = generate(model, given, attention_mask=mask, **{CACHE: cache})
    assert torch.equal(second[:, -TOKENS:], uncached[:, -TOKENS:])
    assert lengths[:2] == [unseen, 1]
    assert cache.get_seq_length() == uncached.shape[1] - 1


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_two_names(model, ids, lengths, name):
    """transformers 5.24 calls it `cache`, and called it `past_key_values` before."""
    more = torch.cat([ids, ids.flip(1)], dim=1)
    logits = model(more).logits[:, 9:]
    torch.testing.assert_close(model(ids.flip(1), **{name: model(ids)[CACHE]}).logits, logits)
    uncached = generate(model, more, use_cache=False)
    cache = model(ids)[CACHE]
    lengths.clear()
    assert torch.equal(generate(model, more, **{name: cache}), uncached)
    assert lengths == [9] + [1] * (TOKENS - 1)


def test_the_default_cache_by_its_name_in_transformers(model, ids, lengths):
    whole = generate(model, ids)
    lengths.clear()
    assert torch.equal(generate(model, ids, cache_implementation="dynamic"), whole)
    assert lengths == [9] + [1] * (TOKENS - 1)


@pytest.mark.parametrize("chunk", [1, 4, 9, 20])
@pytest.mark.parametrize("padded", [False, True])
def test_a_prompt_read_in_chunks(model, ids, lengths, chunk, padded):
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
        mask[2, :1] = 0
    whole = generate(model, ids, attention_mask=mask, use_cache=False)
    lengths.clear()
    assert torch.equal(generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk), whole)
    assert lengths[0] == min(chunk, 9)
    assert len(lengths) == -(-9 // chunk) + TOKENS - 1


def test_generation_from_embeddings(model, ids):
    embeddings = model.get_input_embeddings()(ids)
    generated = generate(model, None, inputs_embeds=embeddings)
    assert torch.equal(generated, generate(model, ids)[:, 9:])


def test_generation_stops_at_the_end_of_text(model, ids):
    free = generate(model, ids)[:, 9:]
    end = free[0, 3].item()
    stopped = generate(model, ids, eos_token_id=end)[:, 9:]
    for ours, theirs in zip(stopped, free, strict=True):
        hits = (theirs == end).nonzero().flatten()
        length = hits[0].item() + 1 if len(hits) else TOKENS
        assert torch.equal(ours[:length], theirs[:length])
        assert (ours[length:] == 0).all()


def test_a_token_that_only_rounds_up_the_vocabulary_is_never_drawn(model, ids, tmp_path):
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(45, mean_resizing=False)
    padded.resize_token_embeddings(42, pad_to_multiple_of=8)
    assert padded.generation_config.suppress_tokens == [*range(42, 48)]
    with torch.no_grad():
        padded.to_logits.weight[40:] *= 100
    assert padded(ids).logits[:, -1].argmax(-1).min() >= 40
    new = generate(padded, ids)[:, 9:]
    assert new.max() in (40, 41)
    padded.save_pretrained(tmp_path)
    loaded = MhesaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(generate(loaded, ids)[:, 9:], new)
    padded.generation_config.suppress_tokens += [7]
    for arguments, suppressed in (((), [*range(42, 48), 7]), ((None, 64), [7, *range(42, 64)]), ((45,), [7])):
        padded.resize_token_embeddings(*arguments)
        assert padded.generation_config.suppress_tokens == suppressed


def test_unsupported_arguments_are_refused(model, ids):
    with pytest.raises(TypeError, match="must be a MhesaCache, not a DynamicCache"):
        generate(model, ids, **{CACHE: DynamicCache()})
    with pytest.raises(ValueError, match="leave out cache_implementation='static'"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match=r"not used by the model: \[.past_values.\]"):
        generate(model, ids, past_values=MhesaCache(model.config))
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, ids[:1], assistant_model=model)


def test_prompts_that_end_in_padding_are_refused(model, ids):
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.raises(ValueError, match="prompts end in padding"):
        generate(model, ids, attention_mask=mask)


def test_stop_strings_with_their_tokenizer(ids):
    torch.manual_seed(0)
    plain = GatedExponentialSmoothingLM(num_tokens=257, dim=16, depth=1, heads=2, dim_mhesa=8)
    model, tokenizer = MhesaForCausalLM.from_plain(plain), ByteTokenizer()
    arguments = {"max_new_tokens": 60, "do_sample": True}
    stop = next(chr(token) for token in generate(model, ids[:1], **arguments)[0, 9:] if 32 < token < 127)
    stopped = generate(model, ids[:1], **arguments, stop_strings=[stop], tokenizer=tokenizer)
    assert chr(stopped[0, -1]) == stop
    assert stopped.shape[1] < 9 + 60
