"""The short convolution against torch's and against scipy's."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter

from mhesa.ops.convolution import causal_convolution, causal_convolution_step

SIZES = {"batch": st.integers(1, 3), "length": st.integers(1, 9), "dim": st.integers(1, 5)}


@settings(deadline=None, max_examples=50)
@given(**SIZES, taps=st.integers(1, 5), seed=st.integers(0, 99), backend=st.sampled_from([None, "chunked"]))
def test_equals_scipy_lfilter(batch, length, dim, taps, seed, backend):
    torch.manual_seed(seed)
    x, weight = torch.randn(batch, length, dim), torch.randn(taps, dim)
    y, state = causal_convolution(x.double(), weight.double(), backend=backend)
    for channel in range(dim):
        expected = lfilter(
            weight[:, channel].double().numpy(), [1.0], x[..., channel].double().numpy(), axis=1
        )
        np.testing.assert_allclose(y[..., channel], expected.reshape(batch, length), atol=1e-12)
    padded = F.pad(x, (0, 0, taps - 1, 0)).double()
    torch.testing.assert_close(state, padded[:, length:], rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 20), max_size=4), taps=st.integers(1, 5), seed=st.integers(0, 99))
def test_any_split_equals_one_call(cuts, taps, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(taps, 3, dtype=torch.float64)
    whole, final = causal_convolution(x, weight)
    state, parts = None, []
    for piece in x.tensor_split(sorted(cuts), dim=1):
        part, state = causal_convolution(piece, weight, initial_state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_steps_equal_one_call():
    x, weight = torch.randn(2, 7, 3), torch.randn(4, 3)
    whole, final = causal_convolution(x, weight)
    state = torch.zeros(2, 3, 3)
    for t in range(7):
        y, state = causal_convolution_step(x[:, t], weight, state)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, final)


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), taps=st.integers(1, 5))
def test_packed_sequences_are_apart(lengths, taps):
    torch.manual_seed(0)
    x, weight = torch.randn(1, sum(lengths), 3), torch.randn(taps, 3)
    initial = torch.randn(len(lengths), taps - 1, 3)
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    y, final = causal_convolution(x, weight, initial_state=initial, cu_seqlens=offsets)
    for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
        alone, state = causal_convolution(x[:, begin:end], weight, initial_state=initial[index : index + 1])
        torch.testing.assert_close(y[:, begin:end], alone)
        torch.testing.assert_close(final[index : index + 1], state)


def test_offsets_may_be_on_the_cpu_with_x_elsewhere():
    x, weight = torch.empty(1, 4, 3, device="meta"), torch.empty(2, 3, device="meta")
    y, final = causal_convolution(x, weight, cu_seqlens=torch.tensor([0, 2, 4]))
    assert (y.device.type, y.shape) == ("meta", x.shape)
    assert (final.device.type, final.shape) == ("meta", (2, 1, 3))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_the_kernel(packed):
    torch.manual_seed(0)
    x = torch.randn(1 if packed else 3, 600, 5, dtype=torch.float64)
    offsets = torch.tensor([0, 1, 1, 300, 600]) if packed else None
    initial = torch.randn(4 if packed else 3, 3, 5, dtype=torch.float64)
    weight, dy = torch.randn(4, 5, dtype=torch.float64), torch.randn_like(x)

    def gradients(initial):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y, final = causal_convolution(*leaves, initial_state=initial, cu_seqlens=offsets)
        y.backward(dy)
        return y.detach(), final.detach(), *(leaf.grad for leaf in leaves)

    # A state that asks for a gradient of its own is served by plain torch.
    for ours, plain in zip(gradients(initial), gradients(initial.clone().requires_grad_()), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(packed):
    x = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 1, 1, 6]) if packed else None
    initial = torch.randn(3 if packed else 1, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x, weight, initial):
        return causal_convolution(x, weight, initial_state=initial, cu_seqlens=offsets)

    assert torch.autograd.gradcheck(run, (x, weight, initial))
    assert torch.autograd.gradgradcheck(run, (x, weight, initial))


def test_narrow_types_sum_in_fp32():
    x, weight = torch.randn(2, 50, 8).bfloat16(), torch.randn(4, 8)
    y, state = causal_convolution(x, weight)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = causal_convolution(x.double(), weight.double())
    assert torch.equal(y, exact.float().bfloat16())


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weight must be \(4, 3\)"):
        causal_convolution(torch.zeros(1, 2, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="initial_state must be"):
        causal_convolution(torch.zeros(1, 2, 3), torch.zeros(4, 3), initial_state=torch.zeros(1, 2, 3))
