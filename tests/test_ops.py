"""Every backend against the definition, in every mode, at fixed rates and at those of every step."""

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
from scans import STEPWISE, Case, error, on_backends, same, serving
from scipy.signal import lfilter
from torch import Tensor

from mhesa.ops import BACKENDS, conv1d_fft, exponential_smoothing, exponential_smoothing_step

FIXED = pytest.mark.parametrize("backend", serving("fixed"))
VARYING = pytest.mark.parametrize("backend", serving("both"))
BACKEND = pytest.mark.parametrize(
    ("rates", "backend"), on_backends(pytest.param(rates) for rates in ("fixed", "both"))
)
RATES = pytest.mark.parametrize("rates", ["fixed", "both"])
# These compute every channel and step apart; a matrix product or an FFT spreads a NaN over its block.
EXACT = pytest.mark.parametrize("backend", ["numba", "reference"])
REVERSE = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
LAYOUT = pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
FLAGS = [[False, True]] * 4


@pytest.mark.parametrize(
    ("rates", "packed", "reverse", "skip", "state", "backend"),
    on_backends(
        covering(itertools.product(["fixed"], *FLAGS))
        + covering(itertools.product(["both", "alpha", "decay"], *FLAGS))
    ),
)
def test_gradients(rates: str, packed: bool, reverse: bool, skip: bool, state: bool, backend: str) -> None:
    shape, offsets = ((1, 5, 2, 1), [0, 2, 2, 5]) if packed else ((2, 3, 2, 1), None)
    case = Case(*shape, rates=rates, skip=skip, state=state, offsets=offsets, reverse=reverse)
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return case.call(*tensors, backend=backend)

    assert torch.autograd.gradcheck(run, tensors, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, tensors, nondet_tol=0.0)


@FIXED
def test_second_derivatives_at_a_decay_of_zero(backend: str) -> None:
    x, alpha = torch.rand(1, 5, 1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    decay = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    state = torch.rand(1, 1, 2, dtype=torch.float64)
    y = exponential_smoothing(x, alpha, decay, initial_state=state, backend=backend)
    (first,) = torch.autograd.grad(y.sum(), decay, create_graph=True)
    # h[t] = x[t] + decay x[t-1] + decay^2 x[t-2] + ..., and the state is x[-1].
    rows = torch.cat([state[:, 0], x[0, :, 0]]).sum(1)
    torch.testing.assert_close(first[0], rows[:-1].sum())
    (second,) = torch.autograd.grad(first, decay)
    torch.testing.assert_close(second[0], 2 * rows[:-2].sum())


@FIXED
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


@VARYING
@REVERSE
def test_rates_that_stay_the_same_equal_fixed_rates(backend: str, reverse: bool) -> None:
    case = Case(2, 400, 3, 8, reverse=reverse)
    y, final, dx, dalpha, ddecay, dskip, dstate = case.results(backend)
    case.alpha, case.decay = (rate.expand(2, 400, 3) for rate in (case.alpha, case.decay))
    results = case.results(backend)
    results[3], results[4] = results[3].sum((0, 1)), results[4].sum((0, 1))
    for result, truth in zip(results, (y, final, dx, dalpha, ddecay, dskip, dstate), strict=True):
        assert error(result, truth) <= 1e-12


@pytest.mark.parametrize(
    ("kinds", "examples", "most"),
    [(["fixed"], 25, 150), (["both", "alpha", "decay"], 15, 300)],
    ids=["fixed", "varying"],
)
@pytest.mark.parametrize(
    ("dtype", "bar"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
def test_accuracy(kinds: list[str], examples: int, most: int, dtype: torch.dtype, bar: float) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.tuples(*(st.integers(1, most) for most in (3, most, 3, 40))),
        rates=st.sampled_from(kinds),
        packed=st.booleans(),
        seed=st.integers(0, 1000),
        options=st.fixed_dictionaries({name: st.booleans() for name in ("skip", "state", "reverse")}),
    )
    def holds(shape: tuple[int, ...], rates: str, packed: bool, seed: int, options: dict[str, bool]) -> None:
        torch.manual_seed(seed)
        cuts = sorted(torch.randint(0, shape[1] + 1, (3,)).tolist())
        offsets = [0, *cuts, shape[1]] if packed else None
        shape = (1, *shape[1:]) if packed else shape
        case = Case(*shape, rates=rates, dtype=dtype, offsets=offsets, **options)
        truths = case.results("reference", torch.float64)
        # Where a gradient that is one sum cancels, the definition itself may miss the bar in this type.
        plain = case.results("reference")
        for backend in serving(rates):
            for result, truth, usual in zip(case.results(backend), truths, plain, strict=True):
                assert error(result, truth) <= max(bar, 4 * error(usual, truth)), backend

    holds()


@RATES
@pytest.mark.parametrize("decay", [0.0, 1e-30, 1e-4, 0.5, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("length", [1, 2, 17, 63, 64, 65, 300])
def test_any_decay(rates: str, decay: float, length: int) -> None:
    case = Case(1, length, 1, 3, rates=rates, dtype=torch.float32)
    case.decay.fill_(decay)
    truths = case.results("reference", torch.float64)
    for backend in serving(rates):
        results = case.results(backend)
        for result, truth in zip(results, truths, strict=True):
            assert result.isfinite().all(), backend
            assert error(result, truth) <= (1e-4 if rates == "fixed" else 1e-5), backend
        if rates == "fixed" and decay == 0 and length > 1 and backend != "fft":
            assert error(results[0][:, 1:], ((case.alpha[:, None] + case.skip) * case.x)[:, 1:]) < 2e-7


@VARYING
def test_a_decay_of_zero_forgets(backend: str) -> None:
    case = Case(2, 40, 2, 5, rates="both", dtype=torch.float32)
    case.decay[:, 20] = 0
    clean, _ = case.call(*case.tensors(), backend=backend)
    case.x[:, :20] *= -3
    changed, _ = case.call(*case.tensors(), backend=backend)
    assert error(changed[:, 20:], clean[:, 20:]) <= 1e-6


@BACKEND
@REVERSE
def test_any_split_equals_one_pass(rates: str, backend: str, reverse: bool) -> None:
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case = Case(2, 30, 2, 5, rates=rates, dtype=dtype, reverse=reverse)
        y, final = case.call(*case.tensors(), backend=backend)
        for _ in range(200 if rates == "fixed" else 30):
            cuts = [0, *sorted(torch.randint(0, 31, (2,)).tolist()), 30]
            spans = list(itertools.pairwise(cuts))
            state, pieces = case.state, {}
            for begin, end in reversed(spans) if reverse else spans:
                pieces[begin, end], state = exponential_smoothing(
                    case.x[:, begin:end],
                    *case.rates_at(slice(begin, end)),
                    skip=case.skip,
                    initial_state=state,
                    reverse=reverse,
                    return_final_state=True,
                    backend=backend,
                )
            assert error(torch.cat([pieces[span] for span in spans], 1), y) <= bar
            assert error(state, final) <= bar


@pytest.mark.parametrize(("rates", "backend"), on_backends(map(pytest.param, STEPWISE)))
def test_steps_equal_the_scan(rates: str, backend: str) -> None:
    case = Case(2, 30, 2, 5, rates=rates)
    y, final = case.call(*case.tensors(), backend=backend)
    state = case.state
    for t in range(30):
        out, state = exponential_smoothing_step(case.x[:, t], *case.rates_at(t), state, skip=case.skip)
        torch.testing.assert_close(out, y[:, t])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("rates", STEPWISE)
def test_gradients_of_a_step(rates: str) -> None:
    case = Case(3, 1, 2, 4, rates=rates)
    tensors = [case.x[:, 0], *case.rates_at(0), case.state, case.skip]

    def step(x: Tensor, alpha: Tensor, decay: Tensor, state: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return exponential_smoothing_step(x, alpha, decay, state, skip=skip)

    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(step, tensors)
    assert torch.autograd.gradgradcheck(step, tensors)


def test_a_step_gives_a_state_of_its_own() -> None:
    x, rate, state = torch.ones(1, 1, 2), torch.full((1,), 0.5), torch.zeros(1, 1, 2)
    y, after = exponential_smoothing_step(x, rate, rate, state)
    y.zero_()
    assert after.tolist() == [[[0.5, 0.5]]]
    assert state.tolist() == [[[0.0, 0.0]]]


@RATES
@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_batch_invariance(rates: str, backend: str, dtype: torch.dtype) -> None:
    case = Case(9, 70, 2, 37, rates=rates, dtype=dtype)
    tensors = {name: getattr(case, name) for name in ("x", "alpha", "decay", "skip", "state")}

    def run(rows: Tensor) -> list[Tensor]:
        mine = {name: tensors[name][rows].requires_grad_() for name in ("x", *case.stepwise, "state")}
        outputs = case.call(*(tensors | mine).values(), backend=backend)
        grads = torch.autograd.grad(outputs, list(mine.values()), (case.dy[rows], case.dfinal[rows]))
        return [outputs[0].detach(), outputs[1].detach(), *grads]

    together = run(torch.arange(9))
    shuffled = torch.randperm(9)
    same(run(shuffled), [tensor[shuffled] for tensor in together])
    for row in range(9):
        same(run(torch.tensor([row])), [tensor[row : row + 1] for tensor in together])


@RATES
@EXACT
@REVERSE
def test_packed_sequences_are_alone(rates: str, backend: str, reverse: bool) -> None:
    offsets = [0, 7, 7, 40, 41, 90]
    options = {"rates": rates, "dtype": torch.float32, "reverse": reverse}
    case = Case(1, 90, 2, 19, offsets=offsets, **options)
    results = case.results(backend)
    by_step = ("x", "dy", *case.stepwise)
    for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
        alone, poisoned = Case(1, 1, 2, 19, **options), Case(1, 90, 2, 19, offsets=offsets, **options)
        for name in ("x", "dy", "alpha", "decay", "skip", "state", "dfinal"):
            whole = getattr(case, name)
            mine, others = whole, whole
            if name in (*by_step, "state", "dfinal"):
                here = (slice(None), slice(begin, end)) if name in by_step else slice(index, index + 1)
                mine, others = whole[here], torch.full_like(whole, torch.nan)
                others[here] = mine
            setattr(alone, name, mine)
            setattr(poisoned, name, others)
        expected = alone.results(backend)
        for found in (results, poisoned.results(backend)):
            same([tensor[:, begin:end] for tensor in case.of_steps(found)], alone.of_steps(expected))
            states = [found[place][index : index + 1] for place in (1, -1)]
            same(states, [expected[1], expected[-1]])


@pytest.mark.parametrize(
    ("rates", "what"),
    [(rates, what) for rates in ("fixed", "both") for what in ("x", "dy", *STEPWISE[rates])],
)
@EXACT
@REVERSE
def test_a_nan_stays_where_it_is(rates: str, backend: str, reverse: bool, what: str) -> None:
    case = Case(2, 20, 2, 21, rates=rates, dtype=torch.float32, reverse=reverse)
    clean = case.of_steps(case.results(backend))
    value = getattr(case, what)
    value[(0, 11, 1, 3)[: value.ndim]] = torch.nan
    dirty = case.of_steps(case.results(backend))
    # From step 11 on in the direction of the scan, and up to it.
    later, earlier = torch.zeros(2, 2, 20, dtype=torch.bool)
    later[0, : 12 if reverse else None] = True
    later[0, : 0 if reverse else 11] = False
    earlier[0, 11 if reverse else 0 : None if reverse else 12] = True
    at, strictly_earlier, strictly_later = earlier & later, earlier & ~later, later & ~earlier
    nothing = torch.zeros_like(at)
    # Of y and of the gradients of x, alpha and decay.
    expected = {
        "x": (later, nothing, at, strictly_later),
        "dy": (nothing, earlier, earlier, earlier),
        "alpha": (later, at, nothing, strictly_later),
        "decay": (later, strictly_earlier, strictly_earlier, strictly_earlier | strictly_later),
    }[what]
    for found, was, steps in zip(dirty, clean, expected[: len(dirty)], strict=True):
        mask = torch.zeros(found.shape, dtype=torch.bool)
        if found.ndim == 3 or what in ("alpha", "decay"):
            mask[:, :, 1] = steps.reshape(*steps.shape, *[1] * (found.ndim - 3))
        else:
            mask[:, :, 1, 3] = steps
        assert found[mask].isnan().all()
        same([found[~mask]], [was[~mask]])


@EXACT
def test_infinity_is_not_nan(backend: str) -> None:
    case = Case(1, 3, 1, 17, dtype=torch.float32, skip=False, state=False)
    case.x[0, 1] = torch.inf
    assert (case.results(backend)[0][:, 1:] == torch.inf).all()


@BACKEND
@LAYOUT
@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_empty_dimensions(rates: str, backend: str, packed: bool, shape: tuple[int, ...]) -> None:
    shape, offsets = ((1, *shape[1:]), [0, 0, shape[1]]) if packed else (shape, None)
    case = Case(*shape, rates=rates, offsets=offsets)
    y, final, dx, dalpha, ddecay, dskip, dstate = case.results(backend)
    assert (y.shape, dx.shape, final.shape) == (case.x.shape, case.x.shape, case.state.shape)
    assert (dalpha.shape, ddecay.shape) == (case.alpha.shape, case.decay.shape)
    if case.x.numel() == 0:
        assert not dskip.any()
        assert not dalpha.any()
        if shape[1] == 0:
            same([final, dstate], [case.state, case.dfinal])
            assert not ddecay.any()


LAYOUTS = {
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "heads last": lambda t: t.transpose(2, -1).contiguous().transpose(2, -1),
    "channels first": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "length first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.cat([t, t, t], dim=-1)[..., t.shape[-1] : 2 * t.shape[-1]],
    "sliced heads": lambda t: torch.cat([t, t], dim=2)[:, :, 3:],
    "every second row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize(
    ("rates", "dtype", "backend"),
    on_backends(
        [
            pytest.param("fixed", torch.float64),
            pytest.param("fixed", torch.bfloat16),
            pytest.param("both", torch.float64),
        ]
    ),
)
def test_any_layout(rates: str, dtype: torch.dtype, backend: str) -> None:
    case = Case(2, 23, 3, 18, rates=rates, dtype=dtype)
    expected = case.results(backend)
    dense = {name: getattr(case, name) for name in ("x", "dy", *case.stepwise)}
    changes = [{"x": x, "dy": dy} for x, dy in itertools.product(LAYOUTS.values(), repeat=2)]
    changes += [{name: change} for name, change in itertools.product(case.stepwise, LAYOUTS.values())]
    for change in changes:
        for name, value in dense.items():
            setattr(case, name, change[name](value) if name in change else value)
        for result, truth in zip(case.results(backend), expected, strict=True):
            if backend == "numba":
                assert torch.equal(result, truth)
            torch.testing.assert_close(result, truth)


@BACKEND
def test_expanded_inputs(rates: str, backend: str) -> None:
    case = Case(2, 23, 3, 18, rates=rates)
    dense = {name: getattr(case, name) for name in ("x", "dy", *case.stepwise)}
    for dims in ((0,), (1,), (2,), (3,), (0, 1), (0, 1, 2), (0, 1, 2, 3)):
        for name, value in dense.items():
            small = value[tuple(slice(1) if dim in dims else slice(None) for dim in range(value.ndim))]
            setattr(case, name, small.expand(value.shape))
        results = case.results(backend)
        for result, truth in zip(results, case.results("reference"), strict=True):
            torch.testing.assert_close(result, truth)
        for name in dense:
            setattr(case, name, getattr(case, name).contiguous())
        same(results, case.results(backend)) if backend == "numba" else None


@BACKEND
def test_outputs_share_no_memory_with_inputs(rates: str, backend: str) -> None:
    case = Case(1, 0, 2, 3, rates=rates)
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
        (
            {"x": torch.zeros(2, 3, 4)},
            r"x must be \(batch, length, heads, head_dim\), not torch.float32 of \(2, 3, 4\) on cpu",
        ),
        ({"x": torch.zeros(1, 4, 2, 3, dtype=torch.int64)}, "x must be floating-point"),
        (
            {"alpha": torch.zeros(3)},
            r"alpha must be \(2,\) or \(1, 4, 2\) for this x, not torch.float32 of \(3,\)",
        ),
        (
            {"alpha": torch.zeros(1, 3, 2)},
            r"alpha must be \(2,\) or \(1, 4, 2\) for this x, not torch.float32 of \(1, 3, 2\)",
        ),
        ({"decay": torch.zeros(2, 1)}, r"decay must be \(2,\)"),
        (
            {"decay": torch.zeros(4, 2)},
            r"decay must be \(2,\) or \(1, 4, 2\) for this x, not torch.float32 of \(4, 2\)",
        ),
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


def test_a_backend_that_takes_fixed_rates_alone_refuses_others() -> None:
    case = Case(1, 4, 2, 3, rates="both")
    message = (
        "^backend 'fft' cannot serve a cpu tensor with rates of every step here; "
        "these can: numba, chunked, reference$"
    )
    with pytest.raises(ValueError, match=message):
        case.call(*case.tensors(), backend="fft")
