"""Scans on the processor: their arguments, their results, and how two are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhesa.ops import BACKENDS, exponential_smoothing

# For each kind of rates: those that have a value for every step.
STEPWISE = {"fixed": (), "both": ("alpha", "decay"), "alpha": ("alpha",), "decay": ("decay",)}


def serving(rates: str) -> list[str]:
    """The backends that scan on the processor at rates of this kind."""
    cpu = torch.device("cpu")
    return [name for name, known in BACKENDS.items() if known.serves(cpu, fixed_rates=rates == "fixed")]


def on_backends(combinations: Iterable[Any]) -> list[Any]:
    """Parameters for `parametrize`: each combination, the first of it a kind of rates, on each backend."""
    return [
        pytest.param(*combination.values, backend, marks=combination.marks)
        for combination in combinations
        for backend in serving(combination.values[0])
    ]


class Case:
    """Arguments of the operator, and gradients of its outputs."""

    def __init__(
        self,
        *shape: int,
        rates: str = "fixed",
        dtype: torch.dtype = torch.float64,
        skip: bool = True,
        state: bool = True,
        offsets: list[int] | None = None,
        reverse: bool = False,
    ) -> None:
        batch, _, heads, head_dim = shape
        sequences = batch if offsets is None else len(offsets) - 1
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.x = torch.randn(shape, dtype=torch.float64).to(dtype)
        self.alpha = torch.rand(heads, dtype=wide)
        self.decay = torch.rand(heads, dtype=wide)
        self.skip = torch.randn(heads, head_dim, dtype=wide) if skip else None
        self.state = torch.randn(sequences, heads, head_dim, dtype=wide) if state else None
        self.offsets = None if offsets is None else torch.tensor(offsets)
        self.reverse = reverse
        self.dy = torch.randn(shape, dtype=torch.float64).to(dtype)
        self.dfinal = torch.randn(sequences, heads, head_dim, dtype=wide)
        self.stepwise = STEPWISE[rates]
        if "alpha" in self.stepwise:
            self.alpha = torch.rand(shape[:3], dtype=wide)
        if "decay" in self.stepwise:
            # From nothing to all of the state, with both ends.
            self.decay = (1.2 * torch.rand(shape[:3], dtype=wide) - 0.1).clamp(0, 1)

    def tensors(self) -> list[Tensor]:
        optional = [tensor for tensor in (self.skip, self.state) if tensor is not None]
        return [self.x, self.alpha, self.decay, *optional]

    def call(self, *tensors: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        x, alpha, decay, *rest = tensors
        skip = rest.pop(0) if self.skip is not None else None
        state = rest.pop(0) if self.state is not None else None
        return exponential_smoothing(
            x,
            alpha,
            decay,
            skip=skip,
            initial_state=state,
            cu_seqlens=self.offsets,
            reverse=self.reverse,
            return_final_state=True,
            backend=backend,
        )

    def results(self, backend: str | None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs and every gradient, computed in `dtype` if given."""
        tensors = [
            (tensor if dtype is None else tensor.to(dtype)).detach().requires_grad_()
            for tensor in self.tensors()
        ]
        outputs = self.call(*tensors, backend=backend)
        grads = [g.to(out.dtype) for g, out in zip((self.dy, self.dfinal), outputs, strict=True)]
        return [out.detach() for out in outputs] + list(
            torch.autograd.grad(outputs, tensors, grads, materialize_grads=True)
        )

    def rates_at(self, step: int | slice) -> tuple[Tensor, ...]:
        """`alpha` and `decay` of one step, or of several."""
        return tuple(rate if rate.ndim == 1 else rate[:, step] for rate in (self.alpha, self.decay))

    def of_steps(self, results: list[Tensor]) -> list[Tensor]:
        """Those results that have a value for every step: of `y, dx`, and of the rates that have one."""
        y, _, dx, dalpha, ddecay, *_ = results
        rates = {"alpha": dalpha, "decay": ddecay}
        return [y, dx, *(rates[name] for name in self.stepwise)]


def same(a: Any, b: Any) -> None:
    """Bit for bit, NaN included."""
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def error(result: Tensor, truth: Tensor) -> float:
    """Root of the mean squared error, relative to that of the truth."""
    if truth.numel() == 0:
        return 0.0
    scale = truth.double().square().mean().sqrt().clamp_min(1e-30)
    return ((result.double() - truth.double()).square().mean().sqrt() / scale).item()
