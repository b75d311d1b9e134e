"""The layers against the original package: parameters, results and every gradient."""

from functools import partial

import pytest
import torch
from gated_state_spaces_pytorch import mhesa as original_package

from mhesa import MHESA, GatedMHESA
from mhesa.errors import InputError

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
LENGTHS = [1, 2, 63, 64, 65, 1000]


def relative_error(value, expected):
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_same_results(ours, original, x):
    """Outputs, input gradients and parameter gradients agree to the tolerance of the type."""
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [ours(inputs[0]), original(inputs[1])]
    direction = torch.randn_like(x)
    for output in outputs:
        output.backward(direction)
    tolerance = TOLERANCE[x.dtype]
    assert relative_error(*outputs) <= tolerance
    assert relative_error(inputs[0].grad, inputs[1].grad) <= tolerance
    expected = dict(original.named_parameters())
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) <= tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reverse_seq", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("batch", "dim", "heads"), [(1, 12, 1), (2, 24, 4), (2, 8, 8)])
def test_mhesa_equals_the_original(batch, dim, heads, length, reverse_seq, dtype):
    torch.manual_seed(length)
    original = original_package.MHESA(dim=dim, heads=heads, reverse_seq=reverse_seq).to(dtype)
    ours = MHESA(dim=dim, heads=heads, reverse_seq=reverse_seq).to(dtype)
    ours.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(ours.state_dict(), strict=True)
    assert_same_results(ours, original, torch.randn(batch, length, dim, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 16, "heads": 1, "dim_mhesa": 12},
        {"dim": 12, "heads": 24, "dim_mhesa": 24, "dim_expansion_factor": 2.5},
        {"dim": 16},
    ],
    ids=["one head", "heads = dim", "defaults"],
)
def test_gated_mhesa_equals_the_original(sizes, length, dtype):
    torch.manual_seed(length)
    original = original_package.GatedMHESA(**sizes).to(dtype)
    ours = GatedMHESA(**sizes).to(dtype)
    ours.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(ours.state_dict(), strict=True)
    assert_same_results(ours, original, torch.randn(2, length, sizes["dim"], dtype=dtype))


@pytest.mark.parametrize(
    ("ours", "original"), [(MHESA, original_package.MHESA), (GatedMHESA, original_package.GatedMHESA)]
)
def test_the_same_seed_gives_the_original_initial_values(ours, original):
    states = []
    for layer in (ours, original):
        torch.manual_seed(3)
        states.append(layer(dim=16, heads=4).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("reverse_seq", [False, True], ids=["forward", "reverse"])
def test_mhesa_carries_its_state(reverse_seq):
    layer = MHESA(dim=12, heads=3, reverse_seq=reverse_seq).double()
    x = torch.randn(2, 10, 12, dtype=torch.float64)
    pieces = list(x.split([4, 0, 1, 5], dim=1))
    outputs, state = [], None
    for piece in reversed(pieces) if reverse_seq else pieces:
        output, state = layer(piece, initial_state=state, return_state=True)
        outputs.append(output)
    joined = torch.cat(outputs[::-1] if reverse_seq else outputs, dim=1)
    whole, final = layer(x, return_state=True)
    assert relative_error(joined, whole) <= 1e-12
    assert relative_error(state, final) <= 1e-12


def test_steps_equal_one_pass():
    block = GatedMHESA(dim=8, heads=2, dim_mhesa=6).double()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    state = torch.zeros(3, 6, dtype=torch.float64)
    outputs = []
    for value in x.unbind(1):
        output, state = block.step(value, state)
        outputs.append(output)
    whole, final = block(x, return_state=True)
    assert relative_error(torch.stack(outputs, 1), whole) <= 1e-12
    assert relative_error(state, final) <= 1e-12


def test_packed_sequences_equal_separate_ones():
    block = GatedMHESA(dim=8, heads=2, dim_mhesa=6).double()
    pieces = [torch.randn(1, length, 8, dtype=torch.float64) for length in (3, 0, 5)]
    states = torch.randn(3, 6, dtype=torch.float64)
    out, final = block(
        torch.cat(pieces, 1),
        initial_state=states,
        return_state=True,
        cu_seqlens=torch.tensor([0, 3, 3, 8]),
    )
    alone = [
        block(piece, initial_state=state[None], return_state=True)
        for piece, state in zip(pieces, states, strict=True)
    ]
    assert relative_error(out, torch.cat([piece for piece, _ in alone], 1)) <= 1e-12
    assert relative_error(final, torch.cat([state for _, state in alone])) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_states_of_narrow_layers_are_fp32(dtype):
    layer = MHESA(dim=8, heads=2).to(dtype)
    y, state = layer(torch.randn(1, 5, 8, dtype=dtype), return_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(
    ("layer", "sizes", "message"),
    [
        (MHESA, {"dim": 10, "heads": 3}, "dim must be divisible by heads, but 10 is not by 3"),
        (MHESA, {"dim": 0, "heads": 1}, "dim must be at least 1, not 0"),
        (MHESA, {"dim": 8, "heads": -2}, "heads must be at least 1, not -2"),
        (GatedMHESA, {"dim": 8, "dim_mhesa": 20, "heads": 8}, "dim_mhesa must be divisible by heads"),
        (GatedMHESA, {"dim": 8, "dim_expansion_factor": 0}, "dim_expansion_factor"),
        (GatedMHESA, {"dim": 8, "conv_size": 1.5}, "conv_size must be a whole number, not 1.5"),
        (MHESA, {"dim": 8, "heads": 2, "backend": "cuda"}, "unknown backend 'cuda'; choose from"),
    ],
)
def test_invalid_sizes_are_refused(layer, sizes, message):
    with pytest.raises(ValueError, match=message):
        layer(**sizes)


def test_a_state_that_does_not_fit_is_refused():
    block = GatedMHESA(dim=16, heads=2, dim_mhesa=8, conv_size=4)
    x, state = torch.randn(2, 9, 16), torch.zeros(2, 8)
    for call in (partial(block, x, initial_state=state), partial(block.step, x[:, 0], state)):
        with pytest.raises(InputError, match=r"a block's state must be \(batch, 56\), not \(2, 8\)"):
            call()


# Dropout


def test_dropout_is_off_where_it_should_be():
    block = GatedMHESA(dim=16, heads=2, dim_mhesa=8, dropout=0.5)
    plain = GatedMHESA(dim=16, heads=2, dim_mhesa=8)
    plain.load_state_dict(block.state_dict())
    x = torch.randn(2, 9, 16)
    assert torch.equal(block.eval()(x), plain(x))
    before = torch.get_rng_state()
    plain.train()(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_dropout_module_is_called_and_can_be_replaced():
    block = GatedMHESA(dim=16, heads=2, dim_mhesa=8, dropout=0.5)
    x, seen = torch.randn(2, 9, 16), []
    block.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block(x)
    assert seen == [(2, 9, 64), (2, 9, 16)]
    expected = block.eval()(x)
    block.train().dropout = torch.nn.Identity()
    assert torch.equal(block(x), expected)


def test_dropout_leaves_the_mean_and_the_residual():
    torch.manual_seed(0)
    block = GatedMHESA(dim=64, heads=2, dim_mhesa=8, dropout=0.25)
    x = torch.randn(1, 9, 64)
    outputs = block(x.expand(2000, -1, -1))
    expected = block.eval()(x)
    assert (outputs.mean(dim=0) - expected).abs().max() < 0.05
    # Of the block's output a quarter is nothing, and only x is left.
    assert ((outputs == x).float().mean() - 0.25).abs() < 0.01
