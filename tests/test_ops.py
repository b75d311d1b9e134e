"""Every backend against the definition, in every mode."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from combinations import covering
from gated_state_spaces_pytorch.mhesa import conv1d_fft as original_conv1d_fft
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from torch import Tensor

from mhesa.ops import BACKENDS, conv1d_fft, exponential_smoothing, exponential_smoothing_step

CPU = torch.device("cpu")
BACKEND = pytest.mark.parametrize("backend", [name for name, known in BACKENDS.items() if known.serves(CPU)])
# These compute every channel and step apart; a matrix product or an FFT spreads a NaN over its block.
EXACT = pytest.mark.parametrize("backend", ["numba", "reference"])
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
LAYOUT = pytest.mark.parametrize("offsets", [None, [0, 2, 2, 5]], ids=["batch", "packed"])


class Case:
    """Arguments of the operator, and gradients of its outputs."""

    def __init__(
        self,
        *shape: int,
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


@BACKEND
@pytest.mark.parametrize(
    ("packed", "reverse", "skip", "state"), covering(itertools.product([False, True], repeat=4))
)
def test_gradients(backend: str, packed: bool, reverse: bool, skip: bool, state: bool) -> None:
    offsets = [0, 2, 2, 5] if packed else None
    case = Case(
        1 if offsets else 2,
        5 if offsets else 3,
        2,
        1,
        skip=skip,
        state=state,
        offsets=offsets,
        reverse=reverse,
    )
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return case.call(*tensors, backend=backend)

    assert torch.autograd.gradcheck(run, tensors, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, tensors, nondet_tol=0.0)


@BACKEND
@REVERSE
def test_the_definition_equals_a_linear_filter(backend: str, reverse: bool) -> None:
    case = Case(2, 200, 3, 4, reverse=reverse)
    x = (case.x.flip(1) if reverse else case.x).numpy()
    y, final = np.empty_like(x), np.empty((2, 3, 4))
    for b, head, i in np.ndindex(2, 3, 4):
        a, d = case.alpha[head].item(), case.decay[head].item()
        h, _ = lfilter([a], [1.0, -d], x[b, :, head, i], zi=[d * case.state[b, head, i].item()])
        y[b, :, head, i] = h + case.skip[head, i].item() * x[b, :, head, i]
        final[b, head, i] = h[-1]
    got_y, got_final = case.call(*case.tensors(), backend=backend)
    assert error(got_y.flip(1) if reverse else got_y, torch.from_numpy(y)) < 1e-12
    assert error(got_final, torch.from_numpy(final)) < 1e-12


@BACKEND
@pytest.mark.parametrize(
    ("dtype", "bar"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
def test_accuracy(backend: str, dtype: torch.dtype, bar: float) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.tuples(*(st.integers(1, most) for most in (3, 150, 3, 40))),
        skip=st.booleans(),
        state=st.booleans(),
        packed=st.booleans(),
        reverse=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def holds(
        shape: tuple[int, ...], skip: bool, state: bool, packed: bool, reverse: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        cuts = sorted(torch.randint(0, shape[1] + 1, (3,)).tolist())
        offsets = [0, *cuts, shape[1]] if packed else None
        shape = (1, *shape[1:]) if packed else shape
        case = Case(*shape, dtype=dtype, skip=skip, state=state, offsets=offsets, reverse=reverse)
        truths = case.results("reference", torch.float64)
        # Where a gradient that is one sum cancels, the definition itself may miss the bar in this type.
        plain = case.results("reference")
        for result, truth, usual in zip(case.results(backend), truths, plain, strict=True):
            assert error(result, truth) <= max(bar, 4 * error(usual, truth))

    holds()


@BACKEND
@pytest.mark.parametrize("decay", [0.0, 1e-30, 1e-4, 0.5, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_any_decay(backend: str, decay: float, length: int) -> None:
    case = Case(1, length, 1, 3, dtype=torch.float32)
    case.decay.fill_(decay)
    results = case.results(backend)
    for result, truth in zip(results, case.results("reference", torch.float64), strict=True):
        assert result.isfinite().all()
        assert error(result, truth) <= 1e-4
    if decay == 0 and length > 1 and backend != "fft":
        assert error(results[0][:, 1:], ((case.alpha[:, None] + case.skip) * case.x)[:, 1:]) < 2e-7


@BACKEND
@REVERSE
def test_any_split_equals_one_pass(backend: str, reverse: bool) -> None:
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case = Case(2, 30, 2, 5, dtype=dtype, reverse=reverse)
        y, final = case.call(*case.tensors(), backend=backend)
        for _ in range(200):
            cuts = [0, *sorted(torch.randint(0, 31, (2,)).tolist()), 30]
            spans = list(itertools.pairwise(cuts))
            state, pieces = case.state, {}
            for begin, end in reversed(spans) if reverse else spans:
                pieces[begin, end], state = exponential_smoothing(
                    case.x[:, begin:end],
                    case.alpha,
                    case.decay,
                    skip=case.skip,
                    initial_state=state,
                    reverse=reverse,
                    return_final_state=True,
                    backend=backend,
                )
            assert error(torch.cat([pieces[span] for span in spans], 1), y) <= bar
            assert error(state, final) <= bar


@BACKEND
def test_steps_equal_the_scan(backend: str) -> None:
    case = Case(2, 30, 2, 5)
    y, final = case.call(*case.tensors(), backend=backend)
    state = case.state
    for t in range(30):
        out, state = exponential_smoothing_step(case.x[:, t], case.alpha, case.decay, state, skip=case.skip)
        torch.testing.assert_close(out, y[:, t])
    torch.testing.assert_close(state, final)


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_batch_invariance(backend: str, dtype: torch.dtype) -> None:
    case = Case(9, 70, 2, 37, dtype=dtype)
    tensors = case.tensors()

    def run(rows: Tensor) -> list[Tensor]:
        x, alpha, decay, skip, state = tensors
        x, state = x[rows].requires_grad_(), state[rows].requires_grad_()
        outputs = case.call(x, alpha, decay, skip, state, backend=backend)
        grads = torch.autograd.grad(outputs, (x, state), (case.dy[rows], case.dfinal[rows]))
        return [outputs[0].detach(), outputs[1].detach(), *grads]

    together = run(torch.arange(9))
    shuffled = torch.randperm(9)
    same(run(shuffled), [tensor[shuffled] for tensor in together])
    for row in range(9):
        same(run(torch.tensor([row])), [tensor[row : row + 1] for tensor in together])


@EXACT
@REVERSE
def test_packed_sequences_are_alone(backend: str, reverse: bool) -> None:
    offsets = [0, 7, 7, 40, 41, 90]
    case = Case(1, 90, 2, 19, dtype=torch.float32, offsets=offsets, reverse=reverse)
    results = case.results(backend)
    for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
        alone = Case(1, 1, 2, 19, dtype=torch.float32, reverse=reverse)
        alone.x, alone.dy = case.x[:, begin:end], case.dy[:, begin:end]
        alone.alpha, alone.decay, alone.skip = case.alpha, case.decay, case.skip
        alone.state, alone.dfinal = case.state[index : index + 1], case.dfinal[index : index + 1]
        y, final, dx, *_, dstate = alone.results(backend)
        poisoned = Case(1, 90, 2, 19, dtype=torch.float32, offsets=offsets, reverse=reverse)
        poisoned.alpha, poisoned.decay, poisoned.skip = case.alpha, case.decay, case.skip
        poisoned.x, poisoned.dy, poisoned.state, poisoned.dfinal = (
            torch.full_like(tensor, torch.nan) for tensor in (case.x, case.dy, case.state, case.dfinal)
        )
        poisoned.x[:, begin:end], poisoned.dy[:, begin:end] = alone.x, alone.dy
        poisoned.state[index], poisoned.dfinal[index] = alone.state[0], alone.dfinal[0]
        for whole in (results, poisoned.results(backend)):
            here = [whole[0][:, begin:end], whole[1][index : index + 1], whole[2][:, begin:end]]
            same([y, final, dx, dstate], [*here, whole[-1][index : index + 1]])


@EXACT
@REVERSE
@pytest.mark.parametrize("what", ["x", "dy"])
def test_a_nan_stays_where_it_is(backend: str, reverse: bool, what: str) -> None:
    case = Case(2, 20, 2, 21, dtype=torch.float32, reverse=reverse)
    clean = case.results(backend)
    getattr(case, what)[0, 11, 1, 3] = torch.nan
    dirty = case.results(backend)
    touched = torch.zeros(2, 20, 2, 21, dtype=torch.bool)
    # Forward to later steps; the gradient of x to earlier ones; dx does not depend on x.
    later = slice(None, 12) if reverse else slice(11, None)
    earlier = slice(11, None) if reverse else slice(None, 12)
    touched[0, later if what == "x" else earlier, 1, 3] = True
    place = 0 if what == "x" else 2
    assert dirty[place][touched].isnan().all()
    same([dirty[place][~touched]], [clean[place][~touched]])
    same([dirty[2 - place]], [clean[2 - place]])


@EXACT
def test_infinity_is_not_nan(backend: str) -> None:
    case = Case(1, 3, 1, 17, dtype=torch.float32, skip=False, state=False)
    case.x[0, 1] = torch.inf
    assert (case.results(backend)[0][:, 1:] == torch.inf).all()


@BACKEND
@LAYOUT
@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_empty_dimensions(backend: str, offsets: list[int] | None, shape: tuple[int, ...]) -> None:
    if offsets is not None:
        shape, offsets = (1, *shape[1:]), [0, 0, shape[1]]
    case = Case(*shape, offsets=offsets)
    y, final, dx, dalpha, ddecay, dskip, dstate = case.results(backend)
    assert (y.shape, dx.shape, final.shape) == (case.x.shape, case.x.shape, case.state.shape)
    if case.x.numel() == 0:
        assert not dskip.any()
        assert not dalpha.any()
        if shape[1] == 0:
            same([final, dstate], [case.state, case.dfinal])
            assert not ddecay.any()


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_any_layout(backend: str, dtype: torch.dtype) -> None:
    case = Case(2, 23, 3, 18, dtype=dtype)
    expected = case.results(backend)
    layouts = {
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "channels first": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        "length first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.cat([t, t, t], dim=-1)[..., 18:36],
        "sliced heads": lambda t: torch.cat([t, t], dim=2)[:, :, 3:],
        "every second row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    }
    dense = case.x, case.dy
    for change_x, change_dy in itertools.product(layouts.values(), repeat=2):
        case.x, case.dy = change_x(dense[0]), change_dy(dense[1])
        for result, truth in zip(case.results(backend), expected, strict=True):
            if backend == "numba":
                assert torch.equal(result, truth)
            torch.testing.assert_close(result, truth)


@BACKEND
def test_expanded_inputs(backend: str) -> None:
    case = Case(2, 23, 3, 18)
    for dims in ((0,), (1,), (0, 1), (2,), (3,), (0, 1, 2, 3)):
        shape = [1 if dim in dims else size for dim, size in enumerate((2, 23, 3, 18))]
        small_x, small_dy = torch.randn(shape).double(), torch.randn(shape).double()
        case.x, case.dy = small_x.expand(2, 23, 3, 18), small_dy.expand(2, 23, 3, 18)
        results = case.results(backend)
        case.x, case.dy = case.x.contiguous(), case.dy.contiguous()
        same(results, case.results(backend)) if backend == "numba" else None
        for result, truth in zip(results, case.results("reference"), strict=True):
            torch.testing.assert_close(result, truth)


@BACKEND
def test_outputs_share_no_memory_with_inputs(backend: str) -> None:
    case = Case(1, 0, 2, 3)
    _, final = case.call(*case.tensors(), backend=backend)
    final.add_(1)
    assert not torch.equal(final, case.state)


@pytest.mark.parametrize("length", [1, 2, 5, 16, 31])
@pytest.mark.parametrize("taps", [1, 2, 5, 16, 31, 64])
def test_the_long_convolution_is_the_originals(length: int, taps: int) -> None:
    x, weights = torch.randn(2, length, 3), torch.randn(taps)
    torch.testing.assert_close(conv1d_fft(x, weights), original_conv1d_fft(x, weights))
    x, weights = torch.randn(2, length, 4, 3), torch.randn(taps, 4)
    ours = conv1d_fft(x, weights, dim=-3, weight_dim=-2)
    torch.testing.assert_close(ours, original_conv1d_fft(x, weights, dim=-3, weight_dim=-2))


def test_the_first_backend_that_serves_is_the_default() -> None:
    assert next(name for name, it in BACKENDS.items() if it.serves(torch.device("cpu"))) == "numba"
    case = Case(2, 30, 2, 9, dtype=torch.float32)
    same(case.results(None), case.results("numba"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be \(batch, length, heads, head_dim\), not \(2, 3, 4\)"),
        ({"x": torch.zeros(1, 4, 2, 3, dtype=torch.int64)}, "x must be floating-point"),
        ({"alpha": torch.zeros(3)}, r"alpha must be \(2,\) or \(1, 4, 2\) for this x, not \(3,\)"),
        ({"decay": torch.zeros(2, 1)}, r"decay must be \(2,\)"),
        ({"skip": torch.zeros(2)}, r"skip must be \(2, 3\)"),
        ({"initial_state": torch.zeros(2, 2, 3)}, r"initial_state must be \(1, 2, 3\)"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens must rise from 0 to the length 4"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must rise"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "integer offsets"),
        ({"x": torch.zeros(2, 4, 2, 3), "cu_seqlens": torch.tensor([0, 4])}, "batch 1"),
        ({"backend": "fast"}, "unknown backend 'fast'; choose from triton, numba, chunked, fft, reference"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(1, 4, 2, 3), "alpha": torch.zeros(2), "decay": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        exponential_smoothing(**arguments)


def test_a_named_backend_never_falls_back() -> None:
    x = torch.zeros(1, 4, 2, 3, device="meta")
    rates = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match="backend 'numba' cannot serve a meta tensor here; these can: "):
        exponential_smoothing(x, rates, rates, backend="numba")
