"""GELU and its gate in one pass: PyTorch's own operators in fp64 are the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhesa.ops.backends import KERNEL_DTYPES
from mhesa.ops.gelu import gelu

EPSILON = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def true_gelu(x: Tensor, gate: Tensor | None = None) -> Tensor:
    return F.gelu(x) if gate is None else gate * F.gelu(x)


def gradients(of: Callable[..., Tensor], dy: Tensor, *tensors: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = of(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@settings(deadline=None)
@given(
    count=st.integers(0, 40) | st.sampled_from([8191, 8192, 8193, 3 * 8192 + 17]),
    gated=st.booleans(),
    dtype=st.sampled_from(KERNEL_DTYPES),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.1, 1.0, 4.0, 30.0]),
)
def test_equals_fp64(count: int, gated: bool, dtype: torch.dtype, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, gate, dy = (torch.randn(count, generator=generator).to(dtype) for _ in range(3))
    x = x * scale
    tensors = (x, gate) if gated else (x,)
    found = gradients(gelu, dy, *tensors)
    expected = gradients(true_gelu, dy.double(), *(tensor.double() for tensor in tensors))
    # The sums Phi(x) + x * phi(x) and 1 + erf(x) cancel: the error is relative to their terms.
    size = (1 + x.double().abs()) * (1 + gate.double().abs()) * (1 + dy.double().abs())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).abs() <= EPSILON[dtype] * size).all()


@pytest.mark.parametrize("gated", [False, True])
def test_errors_are_three_roundings_at_most(gated: bool) -> None:
    """Of fp32, relative to the terms that are summed; PyTorch's own errors reach four."""
    x = torch.linspace(-12, 12, 100_003)
    gate, dy = torch.randn_like(x), torch.randn_like(x)
    tensors = (x, gate) if gated else (x,)
    found = gradients(gelu, dy, *tensors)
    expected = gradients(true_gelu, dy.double(), *(tensor.double() for tensor in tensors))
    terms = (1 + x.double().abs()) * (1 + gate.double().abs() if gated else 1)
    for ours, true, size in zip(found, expected, (terms, terms * dy.abs(), terms * dy.abs()), strict=False):
        assert ((ours - true).abs() <= 3 * 2.0**-24 * size).all()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_nan_stays_where_it_is(dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype)
    gate, dy = torch.randn_like(x), torch.randn_like(x)
    clean = gradients(gelu, dy, x, gate)
    broken = x.clone()
    broken[[3, 500, 999]] = math.nan
    found = gradients(gelu, dy, broken, gate)
    intact = ~broken.isnan()
    for a, b in zip(found, clean, strict=True):
        assert a[~intact].isnan().all()
        assert torch.equal(a[intact], b[intact])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_infinite_huge_and_tiny_values(dtype: torch.dtype) -> None:
    """The oracle is `x * Phi(x)` in fp64: what PyTorch returns at infinity depends on the processor."""
    x = torch.tensor([math.inf, 1e30, 0.0, -0.0, 1e-40, -6.0, -1e30, -math.inf]).to(dtype)
    expected = x.double() * torch.special.ndtr(x.double())
    torch.testing.assert_close(gelu(x).double(), expected, atol=1e-7, rtol=EPSILON[dtype], equal_nan=True)


def test_a_result_does_not_depend_on_the_position() -> None:
    x, gate, dy = (torch.randn(5000) for _ in range(3))
    whole = gradients(gelu, dy, x, gate)
    for part in (slice(0, 1), slice(7, 30), slice(4991, 5000)):
        found = gradients(gelu, dy[part], x[part], gate[part])
        assert all(torch.equal(a, b[part]) for a, b in zip(found, whole, strict=True))


def test_any_layout() -> None:
    x, gate, dy = torch.randn(6, 10).t(), torch.randn(10, 12)[:, ::2], torch.ones(()).expand(10, 6)
    found = gradients(gelu, dy, x, gate)
    expected = gradients(true_gelu, dy, x, gate)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_gradients_can_be_differentiated() -> None:
    tensors = [torch.randn(50, requires_grad=True) for _ in range(2)]
    second = []
    for of in (gelu, true_gelu):
        first = torch.autograd.grad(of(*tensors).pow(2).sum(), tensors, create_graph=True)
        second.append(torch.autograd.grad(sum(grad.pow(2).sum() for grad in first), tensors))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*second, strict=True))


def test_transforms_and_compilers_get_the_operators_of_torch() -> None:
    x, gate = torch.randn(4, 20), torch.randn(4, 20)
    assert torch.equal(torch.vmap(gelu)(x, gate), true_gelu(x, gate))
    tangent = torch.func.jvp(lambda x: gelu(x, gate), (x,), (torch.ones_like(x),))[1]
    assert torch.equal(tangent, torch.func.jvp(lambda x: true_gelu(x, gate), (x,), (torch.ones_like(x),))[1])
    exported = torch.export.export(_Gate(), (x, gate)).module()
    assert torch.equal(exported(x, gate), true_gelu(x, gate))


class _Gate(torch.nn.Module):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gelu(x, gate)


@pytest.mark.parametrize(
    ("x", "gate", "backend"),
    [
        (torch.randn(8, dtype=torch.float64), None, None),
        (torch.randn(8), torch.randn(8).bfloat16(), None),
        (torch.randn(3, 8), torch.randn(8), None),
        (torch.randn(8), torch.randn(8), "reference"),
    ],
    ids=["fp64", "types", "shapes", "backend"],
)
def test_everything_else_is_left_to_torch(x: Tensor, gate: Tensor | None, backend: str | None) -> None:
    assert torch.equal(gelu(x, gate, backend=backend), true_gelu(x, gate))
