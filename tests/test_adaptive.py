"""Adaptive rates and the short convolution in the layers and the model."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

import mhesa
from mhesa import Decoder, GatedExponentialSmoothingLM, GatedMHESA, Reader, Session
from mhesa.errors import InputError
from mhesa.hf import MhesaConfig, MhesaForCausalLM
from mhesa.model.config import ModelConfig
from mhesa.tokenizers import Bytes

SIZES = {"num_tokens": 20, "dim": 12, "depth": 2, "heads": 4, "dim_mhesa": 8}
FORMS = [(True, 0), (False, 3), (True, 4), (True, 1)]


def make(adaptive, conv_size, dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(**SIZES | sizes, adaptive=adaptive, conv_size=conv_size).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv" in name:
                parameter.normal_()
    return model


def test_the_default_is_the_original():
    torch.manual_seed(0)
    default = GatedExponentialSmoothingLM(**SIZES)
    assert not any("conv" in name or "to_alpha" in name for name in default.state_dict())
    assert default.initial_state(3).shape == (2, 3, 8)


def test_without_its_matrix_an_adaptive_model_is_the_original():
    adaptive = make(True, 0)
    original = GatedExponentialSmoothingLM(**SIZES).double()
    with torch.no_grad():
        for layer in adaptive.layers:
            layer.to_alpha.weight.zero_()
    weights = adaptive.state_dict()
    original.load_state_dict({name: weights[name] for name in original.state_dict()})
    ids = torch.randint(20, (2, 50))
    expected, expected_state = original(ids, return_state=True)
    found, state = adaptive(ids, return_state=True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, expected_state, atol=1e-12, rtol=1e-12)


def test_new_parameters_have_their_names_and_initial_values():
    block = GatedMHESA(dim=12, heads=4, dim_mhesa=8, adaptive=True, conv_size=4)
    assert block.state_dict()["to_alpha.weight"].shape == (4, 12)
    weight = block.state_dict()["conv.weight"]
    assert weight.shape == (4, 12)
    assert torch.equal(weight, torch.eye(4)[:, :1].expand(4, 12))
    alpha, decay = block.mhesa.rates()
    # Without damping a head forgets at the rate at which it takes in what is new.
    steps = -1 / torch.log1p(-alpha)
    torch.testing.assert_close(steps, torch.tensor([1, 300 ** (1 / 3), 300 ** (2 / 3), 300]))
    torch.testing.assert_close(decay / (1 - alpha), torch.full((4,), 0.9975), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("adaptive", "conv_size"), FORMS)
def test_any_split_and_steps_equal_one_pass(adaptive, conv_size):
    model, ids = make(adaptive, conv_size), torch.randint(20, (3, 17))
    whole, final = model(ids, return_state=True)
    assert final.shape == (2, 3, 8 + max(conv_size - 1, 0) * 12)
    for cuts in itertools.combinations((1, 2, 9, 16), 2):
        state, parts = model.initial_state(3), []
        for piece in ids.tensor_split(cuts, dim=1):
            part, state = model(piece, state=state, return_state=True)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(state, final, atol=1e-12, rtol=1e-12)
    state = model.initial_state(3)
    for t in range(17):
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, whole[:, t], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, final, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("adaptive", "conv_size"), FORMS)
def test_packed_documents_are_apart(adaptive, conv_size):
    model, ids = make(adaptive, conv_size), torch.randint(20, (1, 15))
    offsets = torch.tensor([0, 1, 3, 3, 15])
    initial = torch.randn_like(model.initial_state(4))
    logits, states = model(ids, state=initial, return_state=True, cu_seqlens=offsets)
    for index, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        if begin == end:
            torch.testing.assert_close(states[:, index], initial[:, index])
            continue
        alone, state = model(ids[:, begin:end], state=initial[:, index : index + 1], return_state=True)
        torch.testing.assert_close(logits[:, begin:end], alone, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(states[:, index : index + 1], state, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("adaptive", "conv_size"), FORMS)
def test_every_parameter_learns(adaptive, conv_size):
    model, ids = make(adaptive, conv_size), torch.randint(20, (2, 9))
    model(ids[:, :-1], labels=ids[:, 1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_convolution_of_negative_size_is_refused():
    with pytest.raises(ValueError, match="conv_size must be 0 or more"):
        GatedMHESA(dim=12, heads=4, dim_mhesa=8, conv_size=-1)


@pytest.mark.parametrize(("adaptive", "conv_size"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_native_step_equals_the_models(adaptive, conv_size, dtype):
    model, ids = make(adaptive, conv_size, dtype), torch.randint(20, (3, 17))
    exact = make(adaptive, conv_size)
    exact.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    whole, final = exact(ids, return_state=True)
    decoder, state = Decoder(model, max_batch=3), model.initial_state(3)
    decoder.prefill(ids[:, :5], state)
    logits = torch.stack([decoder.step(ids[:, t], state) for t in range(5, 17)], dim=1)
    limit = 2e-5 if dtype == torch.float32 else 3e-2
    scale = whole.std()
    assert (logits - whole[:, 5:]).abs().max() < limit * scale * 5
    assert (state - final).abs().max() < limit * final.std() * 5


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_results_are_the_same_bit_for_bit_in_a_batch_and_in_one_stretch(quantize):
    model, ids = make(True, 4, torch.float32), torch.randint(20, (5, 40))
    decoder = Decoder(model, max_batch=5, quantize=quantize)
    together = decoder.initial_state(5)
    logits = [decoder.step(ids[:, t], together) for t in range(40)]
    for row in range(5):
        alone = decoder.initial_state(1)
        stretch = decoder.predict(ids[row], alone)
        assert torch.equal(stretch, torch.stack([step[row] for step in logits]))
        assert torch.equal(alone, together[:, row : row + 1])


@pytest.mark.parametrize(
    ("dtype", "quantize"), [(torch.float32, None), (torch.float32, "int8"), (torch.bfloat16, None)]
)
@pytest.mark.parametrize(("adaptive", "conv_size"), [(True, 0), (True, 2), (True, 9), (False, 0), (False, 4)])
def test_the_number_of_threads_changes_no_bit(dtype, quantize, adaptive, conv_size):
    """The threads share the rows of a call out, unless they are many; some sequences begin within a share."""
    model = make(adaptive, conv_size, torch.float32, dim=64, dim_mhesa=64).to(dtype)
    decoder = Decoder(model, max_batch=3, quantize=quantize)
    texts = [torch.randint(20, (length,)) for length in (700, 3, 317)]
    found, before = {}, torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            state = decoder.initial_state(3)
            logits = decoder.predict(texts, state)
            # Of the last call's 252 rows.
            assert decoder._engine.args.share_rows == {1: 0, 2: 128, 3: 96, 5: 0}[threads]
            prompts = decoder.prefill(texts, state)
            found[threads] = logits, prompts, state
    finally:
        torch.set_num_threads(before)
    assert found[1][0].isfinite().all()
    for results in found.values():
        assert all(map(torch.equal, results, found[1]))


def test_a_session_forks_saves_and_goes_on(tmp_path):
    model = GatedExponentialSmoothingLM(**SIZES | {"num_tokens": 257}, adaptive=True, conv_size=4)
    reader = Reader(model, Bytes())
    session = Session(reader)
    session.feed("the tail of a convolution ")
    fork = session.fork()
    session.save(tmp_path / "text.session")
    again = Session.load(tmp_path / "text.session", reader)
    scores = session.score("is part of the state")
    assert (scores == fork.score("is part of the state")).all()
    assert (scores == again.score("is part of the state")).all()
    other = Reader(GatedExponentialSmoothingLM(**SIZES | {"num_tokens": 257}), Bytes())
    with pytest.raises(InputError):
        Session.load(tmp_path / "text.session", other)


def test_transformers_initial_values_are_the_models():
    config = ModelConfig(num_tokens=20, dim=12, depth=1, heads=4, dim_mhesa=8, adaptive=True, conv_size=4)
    plain = config.build()
    behind = MhesaForCausalLM(MhesaConfig(**config.to_json())).to_plain()
    assert plain.state_dict().keys() == behind.state_dict().keys()
    for name in ("conv.weight", "mhesa.alphas", "mhesa.dampen_factors"):
        name = f"layers.0.{name}"
        assert torch.equal(plain.state_dict()[name], behind.state_dict()[name]), name
    assert ModelConfig.of(behind) == ModelConfig.of(plain)


def test_a_saved_model_is_the_same_behind_transformers(tmp_path):
    model, ids = make(True, 4, torch.float32, num_tokens=257), torch.randint(20, (2, 15))
    mhesa.save(model.eval(), Bytes(), tmp_path)
    again, _ = mhesa.load(tmp_path)
    assert torch.equal(again(ids), model(ids))
    behind = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(behind(ids).logits, model(ids))
    # Padding to the left changes nothing, the convolution included.
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 15)], dim=1).long()
    torch.testing.assert_close(behind(padded, attention_mask=mask).logits[:, 3:], model(ids))
    first = behind(ids[:, :9], use_cache=True)
    rest = behind(ids[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, model(ids)[:, 9:])
    # Without a mask transformers takes each 0 for padding.
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "num_beams": 3}
    arguments |= {"do_sample": False, "pad_token_id": 0}
    assert torch.equal(behind.generate(ids, **arguments), behind.generate(ids, **arguments, use_cache=False))


def test_a_decoder_follows_the_models_backend():
    """Fixed rates alone have an FFT; the reference is a loop over the model's own layers."""
    sizes = {"num_tokens": 11, "dim": 8, "depth": 2, "heads": 2, "dim_mhesa": 4, "adaptive": True}
    original, loop, fft = (
        GatedExponentialSmoothingLM(**sizes, backend=b) for b in (None, "reference", "fft")
    )
    loop.load_state_dict(original.state_dict())
    ids, state = torch.randint(11, (1, 20)), original.initial_state(1)
    found = Decoder(loop).prefill(ids, state.clone())
    with torch.no_grad():
        torch.testing.assert_close(found, loop(ids)[:, -1], rtol=0, atol=1e-6)
    torch.testing.assert_close(found, Decoder(original).prefill(ids, state.clone()), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="backend 'fft' cannot serve a cpu tensor with rates of every step"):
        Decoder(fft).prefill(ids, state)
    with pytest.raises(InputError, match=r"int8 weights need .*, backend fft"):
        Decoder(fft, quantize="int8")
