"""Rates of every step: each backend against the definition, and all that PyTorch does with the operator."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import CPU, EXACT, REVERSE, Case, error, same
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from mhesa.ops import BACKENDS, exponential_smoothing, exponential_smoothing_step, reference
from mhesa.ops.cpu import backend as cpu

STEPWISE = pytest.mark.parametrize("stepwise", ["both", "alpha", "decay"])
BACKEND = pytest.mark.parametrize(
    "backend", [name for name, known in BACKENDS.items() if known.serves(CPU, fixed_rates=False)]
)


class RatesCase(Case):
    """Arguments of the operator where alpha, decay or both have a value for every step."""

    def __init__(self, *shape: int, stepwise: str = "both", **options: Any) -> None:
        super().__init__(*shape, **options)
        if stepwise != "decay":
            self.alpha = torch.rand(shape[:3], dtype=self.alpha.dtype)
        if stepwise != "alpha":
            # From nothing to all of the state, with both ends.
            self.decay = (1.2 * torch.rand(shape[:3], dtype=self.decay.dtype) - 0.1).clamp(0, 1)


# Every pair of values of two options occurs.
PAIRWISE = [
    # stepwise, packed, reverse, skip, state
    ("both", False, False, True, True),
    ("both", True, True, False, False),
    ("both", True, False, True, False),
    ("alpha", False, True, True, False),
    ("alpha", True, False, False, True),
    ("decay", True, True, True, True),
    ("decay", False, False, False, False),
]


@BACKEND
@pytest.mark.parametrize(("stepwise", "packed", "reverse", "skip", "state"), PAIRWISE)
def test_gradients(backend: str, stepwise: str, packed: bool, reverse: bool, skip: bool, state: bool) -> None:
    shape, offsets = ((1, 5, 2, 1), [0, 2, 2, 5]) if packed else ((2, 3, 2, 1), None)
    case = RatesCase(*shape, stepwise=stepwise, skip=skip, state=state, offsets=offsets, reverse=reverse)
    tensors = [tensor.requires_grad_() for tensor in case.tensors()]

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return case.call(*tensors, backend=backend)

    assert torch.autograd.gradcheck(run, tensors, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, tensors, nondet_tol=0.0)


@BACKEND
@pytest.mark.parametrize(
    ("dtype", "bar"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
def test_accuracy(backend: str, dtype: torch.dtype, bar: float) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(
        shape=st.tuples(*(st.integers(1, most) for most in (3, 300, 3, 40))),
        stepwise=st.sampled_from(["both", "alpha", "decay"]),
        skip=st.booleans(),
        state=st.booleans(),
        packed=st.booleans(),
        reverse=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def holds(
        shape: tuple[int, ...], stepwise: str, skip: bool, state: bool, packed: bool, reverse: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        cuts = sorted(torch.randint(0, shape[1] + 1, (3,)).tolist())
        offsets = [0, *cuts, shape[1]] if packed else None
        shape = (1, *shape[1:]) if packed else shape
        case = RatesCase(
            *shape, stepwise=stepwise, dtype=dtype, skip=skip, state=state, offsets=offsets, reverse=reverse
        )
        truths = case.results("reference", torch.float64)
        # Where a gradient that is one sum cancels, the definition itself may miss the bar in this type.
        plain = case.results("reference")
        for result, truth, usual in zip(case.results(backend), truths, plain, strict=True):
            assert error(result, truth) <= max(bar, 4 * error(usual, truth))

    holds()


@BACKEND
@REVERSE
def test_rates_that_stay_the_same_equal_fixed_rates(backend: str, reverse: bool) -> None:
    case = Case(2, 400, 3, 8, reverse=reverse)
    y, final, dx, dalpha, ddecay, dskip, dstate = case.results(backend)
    case.alpha, case.decay = (rate.expand(2, 400, 3) for rate in (case.alpha, case.decay))
    results = case.results(backend)
    results[3], results[4] = results[3].sum((0, 1)), results[4].sum((0, 1))
    for result, truth in zip(results, (y, final, dx, dalpha, ddecay, dskip, dstate), strict=True):
        assert error(result, truth) <= 1e-12


@BACKEND
@pytest.mark.parametrize("decay", [0.0, 1e-30, 1 - 1e-7, 1.0])
@pytest.mark.parametrize("length", [1, 17, 64, 300])
def test_any_decay(backend: str, decay: float, length: int) -> None:
    case = RatesCase(1, length, 1, 3, dtype=torch.float32)
    case.decay.fill_(decay)
    for result, truth in zip(case.results(backend), case.results("reference", torch.float64), strict=True):
        assert result.isfinite().all()
        assert error(result, truth) <= 1e-5


@BACKEND
def test_a_decay_of_zero_forgets(backend: str) -> None:
    case = RatesCase(2, 40, 2, 5, dtype=torch.float32)
    case.decay[:, 20] = 0
    clean, _ = case.call(*case.tensors(), backend=backend)
    case.x[:, :20] *= -3
    changed, _ = case.call(*case.tensors(), backend=backend)
    assert error(changed[:, 20:], clean[:, 20:]) <= 1e-6


@BACKEND
@REVERSE
def test_any_split_equals_one_pass(backend: str, reverse: bool) -> None:
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        case = RatesCase(2, 30, 2, 5, dtype=dtype, reverse=reverse)
        y, final = case.call(*case.tensors(), backend=backend)
        for _ in range(30):
            cuts = [0, *sorted(torch.randint(0, 31, (2,)).tolist()), 30]
            spans = list(itertools.pairwise(cuts))
            state, pieces = case.state, {}
            for begin, end in reversed(spans) if reverse else spans:
                pieces[begin, end], state = exponential_smoothing(
                    case.x[:, begin:end],
                    case.alpha[:, begin:end],
                    case.decay[:, begin:end],
                    skip=case.skip,
                    initial_state=state,
                    reverse=reverse,
                    return_final_state=True,
                    backend=backend,
                )
            assert error(torch.cat([pieces[span] for span in spans], 1), y) <= bar
            assert error(state, final) <= bar


@STEPWISE
def test_steps_equal_the_scan(stepwise: str) -> None:
    case = RatesCase(2, 30, 2, 5, stepwise=stepwise)
    y, final = case.call(*case.tensors(), backend="reference")
    state = case.state
    for t in range(30):
        alpha, decay = (rate if rate.ndim == 1 else rate[:, t] for rate in (case.alpha, case.decay))
        out, state = exponential_smoothing_step(case.x[:, t], alpha, decay, state, skip=case.skip)
        torch.testing.assert_close(out, y[:, t])
    torch.testing.assert_close(state, final)


@STEPWISE
def test_gradients_of_a_step(stepwise: str) -> None:
    case = RatesCase(3, 1, 2, 4, stepwise=stepwise)
    alpha, decay = (rate if rate.ndim == 1 else rate[:, 0] for rate in (case.alpha, case.decay))
    tensors = [tensor.requires_grad_() for tensor in (case.x[:, 0], alpha, decay, case.state, case.skip)]

    def step(x: Tensor, alpha: Tensor, decay: Tensor, state: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        return exponential_smoothing_step(x, alpha, decay, state, skip=skip)

    assert torch.autograd.gradcheck(step, tensors)
    assert torch.autograd.gradgradcheck(step, tensors)


@EXACT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_batch_invariance(backend: str, dtype: torch.dtype) -> None:
    case = RatesCase(9, 70, 2, 37, dtype=dtype)

    def run(rows: Tensor) -> list[Tensor]:
        x, alpha, decay, skip, state = case.tensors()
        mapped = [tensor[rows].requires_grad_() for tensor in (x, alpha, decay, state)]
        x, alpha, decay, state = mapped
        outputs = case.call(x, alpha, decay, skip, state, backend=backend)
        grads = torch.autograd.grad(outputs, mapped, (case.dy[rows], case.dfinal[rows]))
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
    case = RatesCase(1, 90, 2, 19, dtype=torch.float32, offsets=offsets, reverse=reverse)
    results = case.results(backend)
    rows = ("x", "dy", "alpha", "decay")
    for index, (begin, end) in enumerate(itertools.pairwise(offsets)):
        alone = RatesCase(1, 1, 2, 19, dtype=torch.float32, reverse=reverse)
        poisoned = RatesCase(1, 90, 2, 19, dtype=torch.float32, offsets=offsets, reverse=reverse)
        alone.skip = poisoned.skip = case.skip
        for name in (*rows, "state", "dfinal"):
            whole = getattr(case, name)
            here = (slice(None), slice(begin, end)) if name in rows else slice(index, index + 1)
            setattr(alone, name, whole[here])
            setattr(poisoned, name, torch.full_like(whole, torch.nan))
            getattr(poisoned, name)[here] = whole[here]
        y, final, dx, dalpha, ddecay, _, dstate = alone.results(backend)
        for found in (results, poisoned.results(backend)):
            here = [tensor[:, begin:end] for tensor in (found[0], found[2], found[3], found[4])]
            states = [tensor[index : index + 1] for tensor in (found[1], found[-1])]
            same([y, dx, dalpha, ddecay, final, dstate], [*here, *states])


@EXACT
@REVERSE
@pytest.mark.parametrize("what", ["x", "dy", "alpha", "decay"])
def test_a_nan_stays_where_it_is(backend: str, reverse: bool, what: str) -> None:
    case = RatesCase(2, 20, 2, 21, dtype=torch.float32, reverse=reverse)
    clean = case.results(backend)
    value = getattr(case, what)
    value[(0, 11, 1, 3)[: value.ndim]] = torch.nan
    y, _, dx, dalpha, ddecay, *_ = case.results(backend)
    # From step 11 on in the direction of the scan, and up to it.
    later, earlier = torch.zeros(2, 2, 20, dtype=torch.bool)
    later[0, : 12 if reverse else None] = True
    later[0, : 0 if reverse else 11] = False
    earlier[0, 11 if reverse else 0 : None if reverse else 12] = True
    at, strictly_earlier, strictly_later = earlier & later, earlier & ~later, later & ~earlier
    nothing = torch.zeros_like(at)
    expected = {
        "x": (later, nothing, at, strictly_later),
        "dy": (nothing, earlier, earlier, earlier),
        "alpha": (later, at, nothing, strictly_later),
        "decay": (later, strictly_earlier, strictly_earlier, strictly_earlier | strictly_later),
    }[what]
    for found, was, steps in zip((y, dx, dalpha, ddecay), (clean[0], *clean[2:5]), expected, strict=True):
        mask = torch.zeros(found.shape, dtype=torch.bool)
        if found.ndim == 3 or what in ("alpha", "decay"):
            mask[:, :, 1] = steps.reshape(*steps.shape, *[1] * (found.ndim - 3))
        else:
            mask[:, :, 1, 3] = steps
        assert found[mask].isnan().all()
        same([found[~mask]], [was[~mask]])


@BACKEND
@pytest.mark.parametrize("offsets", [None, [0, 0, 5]], ids=["batch", "packed"])
@pytest.mark.parametrize("shape", [(0, 5, 2, 3), (2, 0, 2, 3), (2, 5, 0, 3), (2, 5, 2, 0)])
def test_empty_dimensions(backend: str, offsets: list[int] | None, shape: tuple[int, ...]) -> None:
    if offsets is not None:
        shape, offsets = (1, *shape[1:]), [0, 0, shape[1]]
    case = RatesCase(*shape, offsets=offsets)
    y, final, dx, dalpha, ddecay, dskip, dstate = case.results(backend)
    assert (y.shape, dx.shape, final.shape) == (case.x.shape, case.x.shape, case.state.shape)
    assert dalpha.shape == ddecay.shape == shape[:3]
    if case.x.numel() == 0:
        assert not dskip.any()
        assert not dalpha.any()
        if shape[1] == 0:
            same([final, dstate], [case.state, case.dfinal])


@BACKEND
def test_any_layout(backend: str) -> None:
    case = RatesCase(2, 23, 3, 18)
    expected = case.results(backend)
    layouts = {
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "heads last": lambda t: t.transpose(2, -1).contiguous().transpose(2, -1),
        "length first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced heads": lambda t: torch.cat([t, t], dim=2)[:, :, 3:],
        "every second row": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    }
    dense = {name: getattr(case, name) for name in ("x", "dy", "alpha", "decay")}
    for change, name in itertools.product(layouts.values(), dense):
        for other, value in dense.items():
            setattr(case, other, change(value) if other == name else value)
        for result, truth in zip(case.results(backend), expected, strict=True):
            if backend == "numba":
                assert torch.equal(result, truth)
            torch.testing.assert_close(result, truth)


@BACKEND
def test_expanded_inputs(backend: str) -> None:
    case = RatesCase(2, 23, 3, 18)
    for dims in ((0,), (1,), (2,), (0, 1, 2)):
        for name in ("x", "dy", "alpha", "decay"):
            value = getattr(case, name)
            small = value[tuple(slice(1) if dim in dims else slice(None) for dim in range(value.ndim))]
            setattr(case, name, small.expand(value.shape))
        for result, truth in zip(case.results(backend), case.results("reference"), strict=True):
            torch.testing.assert_close(result, truth)


# What CPU kernels meet: threads, long sequences


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ((1, 3000, 8, 16), None),
        ((3, 300, 2, 80), None),
        ((1, 900, 32, 8), [0, 20, 20, 600, 900]),
        ((40, 70, 2, 33), None),
        ((2, 3001, 1, 7), None),
    ],
)
@REVERSE
@STEPWISE
def test_threads_change_no_bit(
    shape: tuple[int, ...], offsets: list[int] | None, reverse: bool, stepwise: str
) -> None:
    case = RatesCase(*shape, stepwise=stepwise, dtype=torch.float32, offsets=offsets, reverse=reverse)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(case.results("numba"))
    finally:
        torch.set_num_threads(before)
    for several in results[1:]:
        same(several, results[0])
    for result, truth in zip(results[0], case.results("chunked"), strict=True):
        assert error(result, truth) <= 1e-5


def test_a_long_sequence_whose_decays_hardly_decay() -> None:
    case = RatesCase(1, 1 << 16, 2, 2, dtype=torch.float32)
    case.decay = 1 - 1e-4 * torch.rand(case.decay.shape)
    truths = case.results("chunked", torch.float64)
    for result, truth in zip(case.results("numba"), truths, strict=True):
        assert error(result, truth) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_decayed_state_ends_at_zero(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 20000, 1, 32, dtype=dtype)
    x[:, 0] = 1
    rates = torch.full((1, 20000, 1), 0.9, dtype=dtype)
    y, final = exponential_smoothing(x, 1 - rates, rates, return_final_state=True, backend="numba")
    assert not final.any()
    assert not ((y != 0) & (y.abs() < torch.finfo(dtype).smallest_normal)).any()


# What PyTorch does with the operator


def arguments(*, batch: int = 2, length: int = 5, offsets: list[int] | None = None) -> list[Any]:
    """`x, alpha, decay, skip, initial_state`, all requiring gradients."""
    batch, sequences = (batch, batch) if offsets is None else (1, len(offsets) - 1)
    tensors = [
        torch.randn(batch, length, 2, 3),
        torch.rand(batch, length, 2) * 0.8 + 0.1,
        torch.rand(batch, length, 2) * 0.8 + 0.1,
        torch.randn(2, 3),
        torch.randn(sequences, 2, 3),
    ]
    return [tensor.double().requires_grad_() for tensor in tensors]


def mixed(stepwise: str, **options: Any) -> list[Any]:
    """The same with one of the rates fixed."""
    tensors = arguments(**options)
    for place, name in enumerate(("alpha", "decay"), 1):
        if stepwise not in ("both", name):
            tensors[place] = tensors[place][0, 0].detach().requires_grad_()
    return tensors


def run(x: Tensor, alpha: Tensor, decay: Tensor, skip: Tensor, state: Tensor) -> Tensor:
    y, final = exponential_smoothing(
        x, alpha, decay, skip=skip, initial_state=state, return_final_state=True, backend="numba"
    )
    return torch.cat([y.flatten(), final.flatten()])


def energy(*tensors: Tensor) -> Tensor:
    return run(*tensors).pow(3).sum()


def true_energy(*tensors: Tensor) -> Tensor:
    return sum((output.pow(3).sum() for output in reference.scan(*tensors, None, False)), torch.tensor(0.0))


@pytest.mark.parametrize(
    ("stepwise", "offsets", "reverse", "optional"),
    [
        ("both", None, False, True),
        ("both", [0, 2, 2, 5], True, False),
        ("alpha", [0, 2, 2, 5], False, True),
        ("decay", None, True, False),
    ],
)
def test_opcheck(stepwise: str, offsets: list[int] | None, reverse: bool, optional: bool) -> None:
    x, alpha, decay, skip, state = mixed(stepwise, offsets=offsets)
    rest = (skip, state) if optional else (None, None)
    inputs = (x, alpha, decay, *rest, None if offsets is None else torch.tensor(offsets), reverse)
    opcheck(torch.ops.mhesa.numba_forward.default, inputs)
    opcheck(torch.ops.mhesa.numba_backward.default, (torch.randn_like(x), torch.randn_like(state), *inputs))


def test_derivatives_of_third_order() -> None:
    tensors = [tensor.detach() for tensor in arguments(length=3)]

    def third(function: Any) -> Tensor:
        def first(decay: Tensor) -> Tensor:
            value = lambda d: function(tensors[0], tensors[1], d, *tensors[3:])  # noqa: E731
            return torch.func.grad(value)(decay).pow(2).sum()

        return torch.func.grad(lambda d: torch.func.grad(first)(d).pow(2).sum())(tensors[2])

    torch.testing.assert_close(third(energy), third(true_energy))


@STEPWISE
@pytest.mark.parametrize(
    "in_dims", [(0, 0, 0, 0, 0), (None, 0, None, -1, None), (-1, None, 0, None, 0), (0, -1, -1, None, None)]
)
def test_vmap_over_any_arguments(stepwise: str, in_dims: tuple[int | None, ...]) -> None:
    tensors = [
        tensor.detach()
        if dim is None
        else torch.stack([tensor.detach() * (1 - 0.1 * i) for i in range(3)], dim)
        for tensor, dim in zip(mixed(stepwise), in_dims, strict=True)
    ]
    everything = (0, 1, 2, 3, 4)
    for ours, true in (
        (energy, true_energy),
        (torch.func.grad(energy, everything), torch.func.grad(true_energy, everything)),
    ):
        torch.testing.assert_close(torch.vmap(ours, in_dims)(*tensors), torch.vmap(true, in_dims)(*tensors))


def test_vmap_without_a_skip() -> None:
    x, alpha, decay, _, _ = (torch.stack([tensor.detach()] * 2) for tensor in arguments())

    def loss(x: Tensor, alpha: Tensor, decay: Tensor) -> Tensor:
        return exponential_smoothing(x, alpha, decay, backend="numba").pow(2).sum()

    gradients = torch.vmap(torch.func.grad(loss, (0, 1, 2)))(x, alpha, decay)
    alone = torch.func.grad(loss, (0, 1, 2))(x[0], alpha[0], decay[0])
    torch.testing.assert_close(tuple(gradient[1] for gradient in gradients), alone)


@STEPWISE
def test_compile_whole_graph_dynamic(stepwise: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, *rest: run(x * 2, *rest).relu(), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for batch, length in ((2, 4), (3, 7)):
        tensors = mixed(stepwise, batch=batch, length=length)
        y = compiled(*tensors)
        truth = run(tensors[0] * 2, *tensors[1:]).relu()
        # Compiled or not, the kernels are the same and run the same steps.
        assert torch.equal(y, truth)
        ours, true = (torch.autograd.grad(value.sum(), tensors) for value in (y, truth))
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-13)


def test_export() -> None:
    class Scan(torch.nn.Module):
        def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
            return run(x, *rest)

    tensors = [tensor.detach() for tensor in arguments()]
    length = torch.export.Dim("length", min=2, max=1 << 20)
    shapes = ({1: length}, ({1: length}, {1: length}, {}, {}))
    program = torch.export.export(Scan(), tuple(tensors), dynamic_shapes=shapes)
    assert torch.ops.mhesa.numba_forward.default in [node.target for node in program.graph.nodes]
    longer = [tensor.detach() for tensor in arguments(length=9)]
    torch.testing.assert_close(program.module()(*longer), run(*longer))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    tensors = arguments()
    energy(*tensors).backward()
    expected = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    checkpoint(energy, *tensors, use_reentrant=reentrant).backward()
    torch.testing.assert_close([tensor.grad for tensor in tensors], expected)


@REVERSE
def test_states_are_kept_or_computed_anew(reverse: bool) -> None:
    case = RatesCase(2, 500, 3, 16, dtype=torch.float32, reverse=reverse)
    kept = case.results("numba")
    inputs = [tensor.detach() for tensor in case.tensors()]
    same(
        torch.ops.mhesa.numba_backward(case.dy, case.dfinal, *inputs, None, reverse),
        kept[2:],
    )


def test_only_the_final_state_or_only_the_output() -> None:
    tensors = arguments()
    for used in (0, 1):
        outputs = cpu.scan(*tensors, None, False)
        truths = reference.scan(*tensors, None, False)
        ours = torch.autograd.grad(outputs[used].sum(), tensors)
        true = torch.autograd.grad(truths[used].sum(), tensors, materialize_grads=True)
        torch.testing.assert_close(ours, true)


# What is refused


def test_fft_refuses() -> None:
    case = RatesCase(1, 4, 2, 3)
    message = (
        "^backend 'fft' cannot serve a cpu tensor with rates of every step here; "
        "these can: numba, chunked, reference$"
    )
    with pytest.raises(ValueError, match=message):
        case.call(*case.tensors(), backend="fft")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": torch.zeros(1, 3, 2)}, r"alpha must be \(2,\) or \(1, 4, 2\) for this x, not \(1, 3, 2\)"),
        ({"decay": torch.zeros(4, 2)}, r"decay must be \(2,\) or \(1, 4, 2\) for this x, not \(4, 2\)"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    rates = torch.zeros(1, 4, 2)
    arguments = {"x": torch.zeros(1, 4, 2, 3), "alpha": rates, "decay": rates} | change
    with pytest.raises(ValueError, match=message):
        exponential_smoothing(**arguments)


def test_types_it_does_not_take() -> None:
    x = torch.zeros(1, 2, 1, 1, dtype=torch.float8_e4m3fn)
    rates = torch.zeros(1, 2, 1)
    with pytest.raises(ValueError, match="'numba' takes float32, float64, bfloat16, float16, not float8"):
        exponential_smoothing(x, rates, rates, backend="numba")
