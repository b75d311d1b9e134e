"""Dropout on CPU: Threefry in numpy, which the generator's published answers check, is the oracle."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mhesa.errors import InputError
from mhesa.ops.backends import KERNEL_DTYPES
from mhesa.ops.cpu import dropout_kernels
from mhesa.ops.dropout import dropout

Words = npt.NDArray[np.uint32]


def threefry(key: int, counters: npt.NDArray[np.uint64]) -> tuple[Words, Words]:
    """The words of Threefry-2x32 with 13 rounds, for 64-bit keys and counters, low word first."""
    keys = np.array([key, key >> 32, 0x1BD11BDA ^ key ^ key >> 32], np.uint64).astype(np.uint32)
    x, y = counters.astype(np.uint32), (counters >> np.uint64(32)).astype(np.uint32)
    for step in range(13):
        if step % 4 == 0:
            x, y = x + keys[step // 4 % 3], y + keys[(step // 4 + 1) % 3] + np.uint32(step // 4)
        bits = np.uint32([13, 15, 26, 6, 17, 29, 16, 24][step % 8])
        x = x + y
        y = (y << bits | y >> (np.uint32(32) - bits)) ^ x
    return x, y


def true_mask(count: int, probability: float, key: int) -> Tensor:
    """Which of `count` values stay: of each 32, 16 have the first words of 16 counters, 16 the second."""
    words = np.stack(threefry(key, np.arange(-(-count // 32) * 16, dtype=np.uint64).reshape(-1, 16)), axis=1)
    return torch.from_numpy(words.reshape(-1)[:count] >= probability * 2**32)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, 0, (0x9D1C5EC6, 0x8BD50731)),
        (2**64 - 1, 2**64 - 1, (0xFD36D048, 0x2D17272C)),
        (0x03707344_13198A2E, 0x85A308D3_243F6A88, (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_the_oracle_has_the_published_answers(key: int, counter: int, words: tuple[int, int]) -> None:
    """Those of Random123's `kat_vectors`, "threefry2x32 13"."""
    assert tuple(int(word[0]) for word in threefry(key, np.array([counter], np.uint64))) == words


@settings(deadline=None)
@given(
    count=st.integers(0, 100) | st.sampled_from([8191, 8192, 8193, 3 * 8192 + 49]),
    probability=st.floats(1e-6, 1 - 1e-6),
    key=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from(KERNEL_DTYPES),
)
def test_values_and_gradients_have_the_generator_s_mask(
    count: int, probability: float, key: int, dtype: torch.dtype
) -> None:
    x = torch.linspace(0.5, 2, count).to(dtype)
    mask = true_mask(count, probability, key)
    expected = torch.where(mask, x.double() / (1 - probability), 0.0)
    y = dropout_kernels.dropout(x, probability, key)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=0, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_gradient_is_dropped_alike_and_can_be_differentiated(dtype: torch.dtype) -> None:
    x = torch.randn(77, dtype=dtype, requires_grad=True)
    dy = torch.ones(77, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.3)
    [dx] = torch.autograd.grad(y, x, dy, create_graph=True)
    mask = (y != 0) / 0.7
    torch.testing.assert_close(dx, mask.to(dtype))
    torch.testing.assert_close(torch.autograd.grad(dx.sum(), dy)[0], mask.to(dtype))
    many = torch.autograd.grad(y, x, torch.eye(77, dtype=dtype), is_grads_batched=True)[0]
    torch.testing.assert_close(many, mask.diag().to(dtype))


def test_masks_follow_from_the_seed_alone() -> None:
    x = torch.ones(1 << 17)
    torch.manual_seed(0)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    again = dropout(x, 0.5)
    torch.set_num_threads(threads)
    assert torch.equal(first, again)
    assert abs((first == second).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(x.numel())


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_values_are_dropped_by_themselves(probability: float) -> None:
    """Neither more often than asked, nor with a neighbour, nor with the same value of the next call."""
    count = 1 << 20
    torch.manual_seed(1)
    dropped = torch.stack([dropout(torch.ones(count), probability) == 0 for _ in range(2)]).double()
    deviation = math.sqrt(probability * (1 - probability) / count)
    assert abs(dropped[0].mean() - probability) < 5 * deviation
    centred = dropped - probability
    covariances = [(centred[0, :-lag] * centred[0, lag:]).mean() for lag in (1, 2, 15, 16, 31, 32, 8192)]
    covariances.append((centred[0] * centred[1]).mean())
    assert max(map(abs, covariances)) < 5 * probability * (1 - probability) / math.sqrt(count)


def test_nan_stays() -> None:
    assert dropout(torch.full((1000,), math.nan), 0.5).isnan().all()


def test_any_layout() -> None:
    x = torch.rand(6, 10).t() + 1
    torch.manual_seed(2)
    transposed = dropout(x, 0.5)
    torch.manual_seed(2)
    assert torch.equal(transposed, dropout(x.contiguous(), 0.5))


@pytest.mark.parametrize(
    ("x", "probability", "backend"),
    [
        (torch.randn(80, dtype=torch.float64), 0.5, None),
        (torch.randn(80), 1.0, None),
        (torch.randn(80), 0.0, None),
        (torch.randn(80), 0.5, "reference"),
        (torch.randn(80), torch.tensor(0.0), None),
    ],
    ids=["fp64", "one", "zero", "backend", "zero in a tensor"],
)
def test_everything_else_is_left_to_torch(x: Tensor, probability: float, backend: str | None) -> None:
    torch.manual_seed(3)
    y = dropout(x, probability, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(y, F.dropout(x, probability))


def test_transforms_and_compilers_get_the_operator_of_torch() -> None:
    x = torch.randn(4, 20)
    torch.manual_seed(4)
    mapped = torch.vmap(lambda row: dropout(row, 0.5), randomness="different")(x)
    torch.manual_seed(4)
    assert torch.equal(mapped, torch.vmap(lambda row: F.dropout(row, 0.5), randomness="different")(x))
    compiled = torch.compile(_Dropout(), backend="aot_eager", fullgraph=True)(x)
    assert ((compiled == 0) | (compiled == 2 * x)).all()
    assert 0 < (compiled == 0).sum() < x.numel()
    exported = torch.export.export(_Dropout(), (x,))
    assert "aten.dropout.default" in {str(node.target) for node in exported.graph.nodes}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_dispatch_mode_does_not_change_the_mask(where: str, reentrant: bool) -> None:
    """A checkpoint runs again outside of a mode that its first run was in, or the other way round."""
    x = torch.ones(1000, requires_grad=True)
    torch.manual_seed(5)
    with FlopCounterMode(display=False) if where == "forward" else nullcontext():
        y = checkpoint(lambda x: dropout(x * 1, 0.5).pow(2), x, use_reentrant=reentrant)
    with FlopCounterMode(display=False) if where == "backward" else nullcontext():
        y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)


def test_the_operator_for_dispatch_modes() -> None:
    key = torch.tensor(12345)
    operator = torch.ops.mhesa.dropout
    x = torch.randn(50, requires_grad=True)
    torch.library.opcheck(operator, (x, 0.5, key))
    assert torch.equal(operator(x, 0.5, key), dropout_kernels.dropout(x.detach(), 0.5, 12345))
    for wrong in (x.double(), x.detach().long()):
        with pytest.raises(InputError, match="no kernel drops"):
            operator(wrong, 0.5, key)


@pytest.mark.parametrize("probability", [-0.1, 1.5, math.inf])
def test_a_wrong_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(torch.ones(3), probability)


class _Dropout(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, 0.5)
