"""Adaptive rates and the short convolution in the layers and the model."""

import itertools

import pytest
import torch

from mhesa import GatedExponentialSmoothingLM, GatedMHESA

SIZES = {"num_tokens": 20, "dim": 12, "depth": 2, "heads": 4, "dim_mhesa": 8}
FORMS = [(True, 0), (False, 3), (True, 4), (True, 1)]


def make(adaptive, conv_size, dtype=torch.float64):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(**SIZES, adaptive=adaptive, conv_size=conv_size).to(dtype)
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
def test_any_split_and_steps_are_the_whole(adaptive, conv_size):
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
