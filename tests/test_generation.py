"""Generation against full passes, and against itself in other company."""

import pytest
import torch

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError
from mhesa.inference.decoder import Decoder
from mhesa.inference.generation import generate, stream
from mhesa.inference.sampling import Sampling

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GatedExponentialSmoothingLM(num_tokens=19, dim=8, depth=2, heads=2, dim_mhesa=6).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_tokens_equal_those_of_full_passes(model, dtype):
    plain = GatedExponentialSmoothingLM(num_tokens=19, dim=8, depth=2, heads=2, dim_mhesa=6).to(dtype)
    ids = torch.tensor([1, 2, 3])
    with torch.no_grad():
        for token in stream(plain, ids, max_new_tokens=30, sampling=GREEDY):
            assert token == plain(ids[None])[0, -1].argmax().item()
            ids = torch.cat([ids, torch.tensor([token])])
    assert len(ids) == 33


def test_two_thousand_greedy_tokens_agree_with_transformers():
    from mhesa.hf import MhesaConfig, MhesaForCausalLM

    torch.manual_seed(0)
    config = MhesaConfig(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_heads=2, smoothing_size=16)
    theirs = MhesaForCausalLM(config).eval()
    ids = torch.randint(90, (1, 20))
    expected = theirs.generate(ids, max_new_tokens=2000, do_sample=False, eos_token_id=None)[0, 20:]
    (ours,) = generate(theirs.to_plain(), ids, max_new_tokens=2000, sampling=GREEDY)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(), Sampling(top_p=0.8, repetition_penalty=1.3)], ids=str
)
def test_a_prompt_continues_the_same_in_any_company(model, sampling):
    prompts = [torch.randint(19, (length,)) for length in (5, 1, 40, 700, 2, 1, 9)]
    together = generate(model, prompts, max_new_tokens=60, sampling=sampling, seed=5, eos_token_id=0)
    assert len({len(new) for new in together}) > 1 or sampling is GREEDY
    for index, prompt in enumerate(prompts):
        settings = {"max_new_tokens": 60, "sampling": sampling, "seed": 5 + index, "eos_token_id": 0}
        (alone,) = generate(model, [prompt], **settings)
        assert torch.equal(alone, together[index])
        assert list(stream(model, prompt, **settings)) == alone.tolist()


def test_more_prompts_than_the_decoder_takes_are_taken_in_turn(model):
    prompts = [torch.tensor([index % 19]) for index in range(11)]
    whole = generate(model, prompts, max_new_tokens=9, seed=1)
    in_turn = generate(Decoder(model, max_batch=4), prompts, max_new_tokens=9, seed=1)
    assert all(map(torch.equal, whole, in_turn))


def test_a_seed_repeats_and_another_does_not(model):
    ids = torch.tensor([4])
    runs = [list(stream(model, ids, max_new_tokens=40, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert generate(model, [ids, ids], max_new_tokens=40, seed=[2, 1])[1].tolist() == runs[0]


def test_end_of_text_ends_and_is_not_given_out(model):
    ids = torch.tensor([4])
    tokens = list(stream(model, ids, max_new_tokens=60, seed=1))
    ended = list(stream(model, ids, max_new_tokens=60, seed=1, eos_token_id=tokens[5]))
    assert ended == tokens[: tokens.index(tokens[5])]


def test_texts_to_stop_at_end_behind_the_first(model):
    def decode(ids):
        return bytes(97 + token for token in ids)

    (tokens,) = generate(model, torch.tensor([[4]]), max_new_tokens=60, seed=1)
    text = decode(tokens.tolist())
    stops = [text[20:23], text[9:12]]
    end = min(text.index(stop) + 3 for stop in stops)
    (ended,) = generate(
        model, torch.tensor([[4]]), max_new_tokens=60, seed=1, stop=stops, decode_bytes=decode
    )
    assert ended.tolist() == tokens[:end].tolist()


def test_a_state_continues_where_it_was_left(model):
    ids = torch.randint(19, (30,))
    expected = list(stream(model, ids, max_new_tokens=20, seed=3))
    decoder = Decoder(model)
    state = decoder.initial_state(1)
    decoder.prefill(ids[None, :-1], state)
    assert list(stream(decoder, ids[-1:], max_new_tokens=20, seed=3, state=state)) == expected


def test_without_new_tokens_or_prompts_results_are_empty(model):
    assert list(stream(model, torch.tensor([1]), max_new_tokens=0)) == []
    assert generate(model, [torch.tensor([1])], max_new_tokens=0)[0].tolist() == []
    assert generate(model, [], max_new_tokens=5) == []


def test_invalid_prompts_are_refused(model):
    empty = torch.tensor([], dtype=torch.long)
    with pytest.raises(InputError, match="at least one token"):
        next(stream(model, empty, max_new_tokens=1))
    with pytest.raises(InputError, match="at least one token"):
        generate(model, [torch.tensor([1]), empty], max_new_tokens=1)
    with pytest.raises(InputError, match="need 2 seeds"):
        generate(model, torch.ones(2, 3, dtype=torch.long), max_new_tokens=1, seed=[1])
    with pytest.raises(InputError, match="decode_bytes"):
        generate(model, [torch.tensor([1])], max_new_tokens=1, stop=[b"x"])
    with pytest.raises(InputError, match="empty"):
        generate(model, [torch.tensor([1])], max_new_tokens=1, stop=[b""], decode_bytes=bytes)


def test_broken_weights_are_named():
    model = GatedExponentialSmoothingLM(num_tokens=19, dim=8, depth=1, heads=2, dim_mhesa=6)
    with torch.no_grad():
        model.to_logits.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not numbers"):
        list(stream(model, torch.tensor([1]), max_new_tokens=1))
