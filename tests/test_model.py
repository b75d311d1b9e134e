"""The language model against the original package, and its state against one pass."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from commands import run_code
from gated_state_spaces_pytorch import GatedExponentialSmoothingLM as OriginalLM
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layers import LENGTHS, TOLERANCE, relative_error

from mhesa import GatedExponentialSmoothingLM
from mhesa.errors import InputError

SIZES = [
    {"dim": 16, "depth": 2, "heads": 1, "dim_mhesa": 8},
    {"dim": 8, "depth": 3, "heads": 8, "dim_mhesa": 8, "dim_expansion_factor": 1.5},
    {"dim": 16, "depth": 1},
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=["one head", "heads = dim", "defaults"])
def test_the_model_equals_the_original(sizes, batch, length, dtype):
    torch.manual_seed(length)
    original = OriginalLM(num_tokens=11, **sizes).to(dtype)
    ours = GatedExponentialSmoothingLM(num_tokens=11, **sizes).to(dtype)
    ours.load_state_dict(original.state_dict(), strict=True)
    original.load_state_dict(ours.state_dict(), strict=True)
    ids, labels = torch.randint(11, (2, batch, length))
    tolerance = TOLERANCE[dtype]
    assert relative_error(ours(ids), original(ids)) <= tolerance
    losses = ours(ids, labels=labels), original(ids, labels=labels)
    assert relative_error(*losses) <= tolerance
    exact = copy.deepcopy(original).double()
    for loss in (*losses, exact(ids, labels=labels)):
        loss.backward()
    expected, truth = dict(original.named_parameters()), dict(exact.named_parameters())
    for name, parameter in ours.named_parameters():
        grad, theirs, right = parameter.grad, expected[name].grad, truth[name].grad
        # A gate's gradient is one number, which can cancel until the original's own rounding is above the
        # tolerance, on some processors: ours must then be nearer to what the original gives in fp64.
        nearer = relative_error(grad.double(), right) <= relative_error(theirs.double(), right)
        assert relative_error(grad, theirs) <= tolerance or nearer, name


def test_the_same_seed_gives_the_original_initial_values():
    states = []
    for model in (GatedExponentialSmoothingLM, OriginalLM):
        torch.manual_seed(3)
        states.append(model(num_tokens=11, dim=8, depth=2, heads=2, dim_mhesa=6).state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_labels_of_minus_100_do_not_count():
    model = GatedExponentialSmoothingLM(num_tokens=11, dim=8, depth=1, heads=2, dim_mhesa=6)
    ids = torch.randint(11, (1, 6))
    labels = ids.clone()
    labels[:, 3:] = -100
    assert torch.allclose(model(ids, labels=labels), model(ids[:, :3], labels=ids[:, :3]))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_loss_of_a_large_vocabulary_is_the_cross_entropy_of_its_logits(autocast):
    torch.manual_seed(0)
    model = GatedExponentialSmoothingLM(num_tokens=9000, dim=32, depth=1, heads=2, dim_mhesa=8)
    ids, labels = torch.randint(9000, (2, 2, 100))
    labels[:, 90:] = -100
    found = []
    for fused in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (
                model(ids, labels=labels)
                if fused
                else F.cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten())
            )
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, fused in zip(*found, strict=True):
        torch.testing.assert_close(
            fused, plain, rtol=2e-2 if autocast else 1e-5, atol=1e-3 if autocast else 1e-7
        )


def test_the_loss_of_a_large_vocabulary_never_holds_all_logits():
    """Memory at its peak, against that of the logits alone."""
    code = (
        "import torch, mhesa\n"
        "def train(tokens, length):\n"
        "    model = mhesa.GatedExponentialSmoothingLM(num_tokens=tokens, dim=64, depth=1, dim_mhesa=8)\n"
        "    ids = torch.randint(tokens, (1, length))\n"
        "    model(ids, labels=ids).backward()\n"
        "def kilobytes(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(line.split()[1] for line in lines if line.startswith(name)))\n"
        # What is compiled or loaded when it is first used takes memory too.
        "train(300, 2048), train(20_000, 64)\n"
        # proc(5): the peak begins again from what is resident now.
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = kilobytes('VmRSS')\n"
        "train(20_000, 2048)\n"
        "print(1024 * (kilobytes('VmHWM') - before))\n"
    )
    assert 0 < int(run_code(code)[0]) < 2048 * 20_000 * 4 / 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GatedExponentialSmoothingLM(num_tokens=11, dim=8, depth=3, heads=2, dim_mhesa=6).double()


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6), batch=st.integers(1, 3))
def test_any_split_gives_the_logits_of_one_pass(model, lengths, batch):
    ids = torch.randint(11, (batch, sum(lengths)))
    whole, final = model(ids, return_state=True)
    state, logits = model.initial_state(batch), []
    for piece in ids.split(lengths, dim=1):
        out, state = model(piece, state=state, return_state=True)
        logits.append(out)
    assert torch.allclose(torch.cat(logits, 1), whole, rtol=0, atol=1e-12)
    assert torch.allclose(state, final, rtol=0, atol=1e-12)


def test_steps_give_the_logits_of_one_pass(model):
    ids = torch.randint(11, (2, 50))
    whole, final = model(ids, return_state=True)
    state = model.initial_state(2)
    for position, token in enumerate(ids.unbind(1)):
        before = state.clone()
        logits, new_state = model.step(token, state)
        assert torch.equal(state, before)
        assert torch.allclose(logits, whole[:, position], rtol=0, atol=1e-12)
        state = new_state
    assert torch.allclose(state, final, rtol=0, atol=1e-12)


def test_packed_sequences_equal_separate_ones(model):
    pieces = [torch.randint(11, (1, length)) for length in (4, 1, 9)]
    logits, state = model(torch.cat(pieces, 1), return_state=True, cu_seqlens=torch.tensor([0, 4, 5, 14]))
    alone = [model(piece, return_state=True) for piece in pieces]
    assert torch.allclose(logits, torch.cat([out for out, _ in alone], 1), rtol=0, atol=1e-12)
    assert torch.allclose(state, torch.cat([final for _, final in alone], 1), rtol=0, atol=1e-12)


def test_state_is_one_small_fp32_tensor():
    model = GatedExponentialSmoothingLM(num_tokens=11, dim=8, depth=12, dim_mhesa=512).bfloat16()
    state = model.initial_state(1)
    assert (state.shape, state.dtype) == ((12, 1, 512), torch.float32)
    assert state.nbytes == 24 * 1024
    _, state = model.step(torch.tensor([3]), state)
    assert (state.shape, state.dtype) == ((12, 1, 512), torch.float32)


@pytest.mark.parametrize("shape", [(2, 1, 6), (3, 6), (3, 1, 5), (3, 2, 6)], ids=str)
def test_a_state_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match="state must be"):
        model(torch.zeros(1, 4, dtype=torch.long), state=torch.zeros(shape))


def test_ids_states_and_labels_that_do_not_fit_are_refused(model):
    ids = torch.zeros(2, 4, dtype=torch.long)
    for call, message in (
        (partial(model, ids[0]), r"token ids must be \(batch, length\), not \(4,\)"),
        (partial(model, ids, labels=ids[:, 1:]), r"labels must be \(2, 4\), as the ids, not \(2, 3\)"),
        (partial(model, ids, state=model.initial_state(3)), r"state must be \(3, 2, 6\) .*, not \(3, 3, 6\)"),
        (partial(model.step, ids[:, 0], None), r"state must be \(3, 2, 6\) .*, not NoneType"),
        (partial(model.step, ids, model.initial_state(2)), r"token ids must be \(batch,\), .*, not \(2, 4\)"),
    ):
        with pytest.raises(InputError, match=message):
            call()
